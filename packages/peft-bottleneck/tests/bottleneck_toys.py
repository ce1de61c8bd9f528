"""Two transformers of a few lines, with norms before and behind the sub-layers, and the roles of their modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import hookimpl, register_extension, unregister_extension

WIDTH, INNER = 8, 12
_PARTS = {"blocks": ["blocks"], "query": ["query"], "output": ["output"], "up": ["up"], "down": ["down"]}
ROLES = {
    "toy_pre": {**_PARTS, "attention_norm": ["norm1"], "feed_forward_norm": ["norm2"]},
    "toy_post": {**_PARTS, "attention_add_norm": ["norm1"], "feed_forward_add_norm": ["norm2"]},
    "toy_no_norms": _PARTS,
    "toy_tiny_net": {"blocks": ["blocks"], "up": ["up"], "down": ["down"], "feed_forward_norm": ["norm"]},
    "toy_twins": {**_PARTS, "down": ["down", "up"]},
    "toy_no_blocks": {"down": ["down"]},
}


class ToyRoles:
    @hookimpl
    def peft_architectures(self) -> Any:
        return ROLES


@contextmanager
def toy_roles() -> Iterator[None]:
    """Within, the roles of these model types are known."""
    register_extension(ToyRoles(), "roles of toys")
    try:
        yield
    finally:
        unregister_extension("roles of toys")


class ToyBlock(nn.Module):
    """An "attention" that mixes positions by a running mean, and a feed-forward network."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.post = post
        self.query, self.output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        mixed = self.query(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        out: Tensor = self.output(mixed.tanh())
        return out

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out

    def forward(self, x: Tensor) -> Tensor:
        for part, norm in ((self.attend, self.norm1), (self.feed, self.norm2)):
            x = norm(x + part(x)) if self.post else x + part(norm(x))
        return x


class Toy(nn.Module):
    """(batch, time, WIDTH) -> the same. `model_type` says where the norms are."""

    def __init__(self, model_type: str = "toy_pre") -> None:
        super().__init__()
        self.config = {"model_type": model_type}
        self.blocks = nn.ModuleList(ToyBlock(model_type == "toy_post") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def toy(model_type: str) -> Any:
    """A toy in float64, always with the same weights; gains and biases are random too."""
    torch.manual_seed(0)
    model = Toy(model_type).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fill(model: Any, name: str = "default", seed: int = 0) -> Any:
    """Values for every trained tensor of an adapter, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft.adapters[name].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.5)
    return model

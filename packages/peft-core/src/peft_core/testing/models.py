"""The models the contract is proved on: small, in plain torch, with a layer of every kind."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 32
WIDTH = 16
INNER = 24
CLASSES = 5
TIME = 6


class Block(nn.Module):
    """x + scale · down(gelu(up(norm(x))))"""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        out: Tensor = x + scale * self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class Mixer(nn.Module):
    """Attention and convolutions over time; the rows of a batch never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.conv2d = nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        channels = x.transpose(1, 2)
        channels = channels + self.conv1d(channels)
        channels = channels + self.conv2d(channels.unflatten(2, (TIME // 2, 2))).flatten(2)
        out: Tensor = channels.transpose(1, 2)
        return out


class TinyNet(nn.Module):
    """Token ids (batch, TIME) -> scores (batch, TIME, CLASSES).

    `checkpointing` recomputes the blocks in backward: None, "reentrant" or "non-reentrant".
    """

    kinds: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"),
        "embedding": ("embedding",),
        "attention": ("mixer.attention",),
        "conv1d": ("mixer.conv1d",),
        "conv2d": ("mixer.conv2d",),
        "norm": ("blocks.0.norm", "blocks.1.norm"),
        "block": ("blocks.0", "blocks.1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing: str | None = None
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.mixer = Mixer()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.checkpointing == "reentrant" and not x.requires_grad:
            # The older kind only sees gradients that come in by its arguments.
            x = x.detach().requires_grad_()
        for block in (self.mixer, *self.blocks):
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        scores: Tensor = self.head(x)
        return scores

    @classmethod
    def targets(cls, kinds: Collection[str]) -> list[str]:
        """Names of the modules of these kinds."""
        return [name for kind, names in cls.kinds.items() if kind in kinds for name in names]


class Holder(nn.Module):
    """A model that is one layer, called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A module with the same weights each time, in eval mode; biases and gains are random too, so that none
    is idle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.to(dtype).eval()


def token_ids(rows: int = 4, seed: int = 0, padding: bool = True) -> Tensor:
    """Token ids (rows, TIME), the padding token among them or not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, TIME), generator=generator)
    if padding:
        ids[0, -1] = 0
    return ids

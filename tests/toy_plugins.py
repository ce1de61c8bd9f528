"""Toy plugins of tests: made of a config class and an adapter class, registered while a test file runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_core import hookimpl, register_method, unregister_method


def plugin(config_class: Any, adapter_class: Any, **hooks: Callable[..., Any]) -> Any:
    """A method whose `peft_build` is `adapter_class(layer, config)`; other hooks by name."""

    @hookimpl
    def peft_config() -> Any:
        return config_class

    @hookimpl
    def peft_build(config: Any, layer: Any) -> Any:
        return adapter_class(layer, config)

    given = {name: hookimpl(function) for name, function in hooks.items()}
    return SimpleNamespace(**{"peft_config": peft_config, "peft_build": peft_build, **given})


@contextmanager
def registered(*plugins: Any) -> Iterator[None]:
    """These methods are known inside."""
    names = []
    try:
        for one in plugins:
            names.append(register_method(one).name)
        yield
    finally:
        for name in names:
            unregister_method(name)


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Block(nn.Module):
    def __init__(self, width: int, checkpoint: str | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self._inner(x)
        found: Tensor = checkpoint(self._inner, x, use_reentrant=self.checkpoint == "reentrant")
        return found

    def _inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """A classifier of (rows, width) whose output has a loss where labels are given; it takes no other argument.

    With `checkpoint`, "reentrant" or "saved", its blocks are recomputed by torch's own function.
    """

    def __init__(self, width: int = 6, classes: int = 4, blocks: int = 2, checkpoint: str | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, checkpoint) for _ in range(blocks)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(logits, loss)


def net(seed: int = 0, **fields: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**fields)


def randomise(model: Any, name: str = "default", seed: int = 1, std: float = 0.3) -> Any:
    """Values that change the output, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft.record(name).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std)
    return model

"""Bottleneck adapters for peft-core: Houlsby, Pfeiffer, parallel and scaled parallel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import OutputAdapter, ResidualAdapter, ResidualRecorder, SumAdapter
    from .config import BottleneckConfig

__all__ = ["BottleneckConfig", "OutputAdapter", "ResidualAdapter", "ResidualRecorder", "SumAdapter"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "config" if name == "BottleneckConfig" else "adapters"
        return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

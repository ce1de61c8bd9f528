"""Orthogonal fine-tuning for peft-core: OFT and BOFT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boft import BOFTConfig
    from .oft import OFTConfig

__all__ = ["BOFTConfig", "OFTConfig"]

_HOME = {"BOFTConfig": "boft", "OFTConfig": "oft"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

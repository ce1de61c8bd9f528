"""IA3 for peft-core: learned rescaling of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ia3 import IA3Adapter, IA3Config

__all__ = ["IA3Adapter", "IA3Config"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import ia3

        return getattr(ia3, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Low-rank adaptation for peft-core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LoraConfig

__all__ = ["LoraConfig"]


def __getattr__(name: str) -> Any:
    if name == "LoraConfig":
        from .config import LoraConfig

        return LoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

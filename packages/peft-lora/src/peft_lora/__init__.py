"""Low-rank adaptation for peft-core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .combining.conversion import LoraConversion, convert_to_lora, save_as_lora
    from .config import LoraConfig
    from .loha import LoHaConfig
    from .lokr import LoKrConfig
    from .optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from .xlora import XLoraConfig, xlora_controls

__all__ = [
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraConversion",
    "XLoraConfig",
    "convert_to_lora",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "save_as_lora",
    "xlora_controls",
]

_MODULES = {
    **dict.fromkeys(("LoraConversion", "convert_to_lora", "save_as_lora"), "combining.conversion"),
    "LoHaConfig": "loha",
    "LoKrConfig": "lokr",
    "LoraConfig": "config",
    **dict.fromkeys(("create_lorafa_optimizer", "create_loraplus_optimizer"), "optimizers"),
    **dict.fromkeys(("XLoraConfig", "xlora_controls"), "xlora"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

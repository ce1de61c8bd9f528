"""Low-rank adaptation for peft-core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adalora.config import AdaLoraConfig
    from .adalora.history import plot_ranks, prune_ranks, rank_history
    from .combining.conversion import LoraConversion, convert_to_lora, save_as_lora
    from .config import LoraConfig
    from .hotswap import check_hotswap_configs_compatible, prepare_model_for_compiled_hotswap
    from .loha import LoHaConfig
    from .lokr import LoKrConfig
    from .optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from .start_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
    from .starts.loftq import replace_lora_weights_loftq
    from .xlora import XLoraConfig, xlora_controls

__all__ = [
    "AdaLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraConversion",
    "LoraGAConfig",
    "XLoraConfig",
    "check_hotswap_configs_compatible",
    "convert_to_lora",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "plot_ranks",
    "prepare_model_for_compiled_hotswap",
    "prune_ranks",
    "rank_history",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "xlora_controls",
]

_MODULES = {
    **dict.fromkeys(("LoraConversion", "convert_to_lora", "save_as_lora"), "combining.conversion"),
    "AdaLoraConfig": "adalora.config",
    **dict.fromkeys(("plot_ranks", "prune_ranks", "rank_history"), "adalora.history"),
    **dict.fromkeys(("CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig"), "start_configs"),
    **dict.fromkeys(("check_hotswap_configs_compatible", "prepare_model_for_compiled_hotswap"), "hotswap"),
    "LoHaConfig": "loha",
    "LoKrConfig": "lokr",
    "LoraConfig": "config",
    **dict.fromkeys(("create_lorafa_optimizer", "create_loraplus_optimizer"), "optimizers"),
    "replace_lora_weights_loftq": "starts.loftq",
    **dict.fromkeys(("XLoraConfig", "xlora_controls"), "xlora"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

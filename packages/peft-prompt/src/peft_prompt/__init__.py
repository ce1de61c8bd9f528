"""Prompt methods for peft-core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adaption_prompt import AdaptionPromptConfig
    from .multitask_prompt_tuning import MultitaskPromptTuningConfig
    from .p_tuning import PromptEncoderConfig
    from .prefix_tuning import PrefixTuningConfig
    from .prompt_tuning import PromptTuningConfig

__all__ = [
    "AdaptionPromptConfig",
    "MultitaskPromptTuningConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
]

_MODULES = {
    "AdaptionPromptConfig": "adaption_prompt",
    "MultitaskPromptTuningConfig": "multitask_prompt_tuning",
    "PrefixTuningConfig": "prefix_tuning",
    "PromptEncoderConfig": "p_tuning",
    "PromptTuningConfig": "prompt_tuning",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

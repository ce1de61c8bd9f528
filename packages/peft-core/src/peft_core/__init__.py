"""peft-core: the plugin framework for parameter-efficient fine-tuning.

Names are imported on first use (PEP 562): importing this package imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import Adapter, DeltaAdapter, WeightAdapter, as_compute
    from .architectures import role_paths
    from .auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .backbones import backbone_sites, prefix_sites
    from .banks import Seeded
    from .calibration import Batches
    from .calls import Call
    from .combining import CombineSource
    from .config import AdapterConfig, PeftConfig, TargetedConfig
    from .discovery import refresh
    from .errors import (
        AdapterNameError,
        AdapterNotFoundError,
        CheckpointError,
        CheckpointMismatchError,
        CombineError,
        ConfigError,
        MergeError,
        MethodClashError,
        MethodContractError,
        MethodDisabledError,
        MethodError,
        MethodImportError,
        MethodNotFoundError,
        MethodVersionError,
        PeftError,
        RequestError,
        TargetError,
    )
    from .extensions import register_extension, unregister_extension
    from .functions import (
        get_layer_status,
        get_model_status,
        get_peft_config,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from .hookspecs import hookimpl, hookspec
    from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
    from .layers import AttentionLayer, BaseLayer, ConvLayer, EmbeddingLayer, LinearLayer, SiteRequest
    from .link import Link
    from .methods import (
        Method,
        MethodInfo,
        available_methods,
        load_method,
        register_method,
        unregister_method,
    )
    from .model import PeftModel, get_peft_model
    from .planned import Plan, plan
    from .prefixes import PositionShift, PrefixAdapter
    from .prompts import EncoderMask, PromptAdapter
    from .records import AdapterState, Structure
    from .tasks import TaskType
    from .training import Drive, drive
    from .tree import base_modules

    __version__: str

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterNameError",
    "AdapterNotFoundError",
    "AdapterState",
    "AttentionLayer",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BaseLayer",
    "Batches",
    "Call",
    "CheckpointError",
    "CheckpointMismatchError",
    "CombineError",
    "CombineSource",
    "ConfigError",
    "ConvLayer",
    "DeltaAdapter",
    "Drive",
    "EmbeddingLayer",
    "EncoderMask",
    "LinearLayer",
    "Link",
    "MergeError",
    "Method",
    "MethodClashError",
    "MethodContractError",
    "MethodDisabledError",
    "MethodError",
    "MethodImportError",
    "MethodInfo",
    "MethodNotFoundError",
    "MethodVersionError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "Plan",
    "PositionShift",
    "PrefixAdapter",
    "PromptAdapter",
    "RequestError",
    "Seeded",
    "SiteRequest",
    "Structure",
    "TargetError",
    "TargetedConfig",
    "TaskType",
    "WeightAdapter",
    "__version__",
    "as_compute",
    "available_methods",
    "backbone_sites",
    "base_modules",
    "drive",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hookimpl",
    "hookspec",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "inject_adapter_in_model",
    "load_method",
    "load_peft_weights",
    "plan",
    "prefix_sites",
    "refresh",
    "register_extension",
    "register_method",
    "role_paths",
    "set_peft_model_state_dict",
    "unregister_extension",
    "unregister_method",
]

# The public names of each module. No name may be that of a submodule: importing that would hide the name.
_NAMES = {
    "adapter": ("Adapter", "DeltaAdapter", "WeightAdapter", "as_compute"),
    "architectures": ("role_paths",),
    "auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "backbones": ("backbone_sites", "prefix_sites"),
    "prefixes": ("PositionShift", "PrefixAdapter"),
    "prompts": ("EncoderMask", "PromptAdapter"),
    "records": ("AdapterState", "Structure"),
    "calibration": ("Batches",),
    "calls": ("Call",),
    "combining": ("CombineSource",),
    "banks": ("Seeded",),
    "training": ("Drive", "drive"),
    "link": ("Link",),
    "config": ("AdapterConfig", "PeftConfig", "TargetedConfig"),
    "discovery": ("refresh",),
    "errors": (
        "AdapterNameError",
        "AdapterNotFoundError",
        "CheckpointError",
        "CheckpointMismatchError",
        "CombineError",
        "ConfigError",
        "MergeError",
        "MethodClashError",
        "MethodContractError",
        "MethodDisabledError",
        "MethodError",
        "MethodImportError",
        "MethodNotFoundError",
        "MethodVersionError",
        "PeftError",
        "RequestError",
        "TargetError",
    ),
    "extensions": ("register_extension", "unregister_extension"),
    "functions": (
        "get_layer_status",
        "get_model_status",
        "get_peft_config",
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "load_peft_weights",
        "set_peft_model_state_dict",
    ),
    "hookspecs": ("hookimpl", "hookspec"),
    "hotswap": ("hotswap_adapter", "hotswap_adapter_from_state_dict"),
    "layers": ("AttentionLayer", "BaseLayer", "ConvLayer", "EmbeddingLayer", "LinearLayer", "SiteRequest"),
    "methods": (
        "Method",
        "MethodInfo",
        "available_methods",
        "load_method",
        "register_method",
        "unregister_method",
    ),
    "model": ("PeftModel", "get_peft_model"),
    "planned": ("Plan", "plan"),
    "tasks": ("TaskType",),
    "tree": ("base_modules",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

# Hidden from type checkers, which see the imports above and so notice a misspelt name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from .discovery import core_version

            # A bare source tree, not installed, has no version.
            return core_version() or "0+unknown"
        if name not in _HOME:
            from .suggest import did_you_mean

            raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{did_you_mean(name, _HOME)}")
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

"""Room for hot swaps: adapters of LoRA whose rank is padded before the model is compiled.

model = PeftModel.from_pretrained(base, "first")
prepare_model_for_compiled_hotswap(model, target_rank=64)
compiled = torch.compile(model)
hotswap_adapter(compiled, "second")  # nothing is compiled again
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from peft_core.errors import ConfigError, PeftError
from peft_core.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, rebuilt, unwrapped
from peft_core.model import PeftModel

from .config import LoraConfig, is_anchored

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Give every LoRA adapter of the model room for ranks up to `target_rank`; they compute what they did.

    Args:
        target_rank: the largest rank that will be swapped in; by default the largest that `config` and the model's own
            adapters have.
        config: the configs of the adapters to come, one or several by name.
        check_compiled: what to do where the model is compiled already, and would be once more.

    Raises `ConfigError` where a rank of the model's adapters is larger than `target_rank`, and `PeftError` where the
    model is compiled, with nothing changed.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PeftModel):
        raise PeftError("this model has no adapters; load one before making room for others")
    if inner is not model or getattr(inner, "_compiled_call_impl", None) is not None:
        _compiled_already(check_compiled)
    own = {name: found for name, found in inner.peft_config.items() if isinstance(found, LoraConfig)}
    if not own:
        raise PeftError(f"no adapter of this model is a LoRA: {list(inner.peft_config)}")
    coming = [] if config is None else list(config.values()) if isinstance(config, Mapping) else [config]
    largest = max(_ranks([*own.values(), *coming]))
    rank = largest if target_rank is None else target_rank
    if rank < largest:
        raise ConfigError(f"target_rank={target_rank}, but there are adapters of rank {largest}")
    for name, found in own.items():
        # One scaling for all layers, kept where it was one before; else it goes into B.
        alike = not found.alpha_pattern and not found.rank_pattern and not found.use_rslora
        scaling = found.lora_alpha / found.r if alike else 1
        plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
        rebuilt(inner, name, found.resolve(r=rank, lora_alpha=rank * scaling, **plain))


def check_hotswap_configs_compatible(config0: LoraConfig, config1: LoraConfig) -> None:
    """Raise `ConfigError` where an adapter of the one config cannot be swapped for one of the other, whatever its rank.

    Ranks, scalings (patterns and rsLoRA among them) and dropout may differ: the first two are folded into the tensors,
    and the adapter on the model keeps its dropout.
    """
    different = [
        f"{name}: {first!r} and {second!r}"
        for name in ("use_dora", "use_qalora", "qalora_group_size", "alora_invocation_tokens")
        if (first := getattr(config0, name)) != (second := getattr(config1, name))
    ]
    if config1.lora_bias and not config0.lora_bias:
        different.append("lora_bias: the second has biases, and the first has no place for them")
    if different:
        raise ConfigError("these adapters cannot be swapped for one another: " + "; ".join(different))


def _ranks(configs: list[LoraConfig]) -> list[int]:
    """Ranks of what these adapters compute; a start that is subtracted counts as well."""
    return [
        rank * (2 if is_anchored(config.init_lora_weights) else 1)
        for config in configs
        for rank in (config.r, *config.rank_pattern.values())
    ]


def _compiled_already(check: str) -> None:
    text = "the model is compiled already, and making room replaces tensors: it would be compiled again"
    if check == "error":
        raise PeftError(f"{text}. Make room before compiling, or pass check_compiled='ignore'")
    if check == "warn":
        warnings.warn(text, stacklevel=3)
    elif check != "ignore":
        raise ConfigError(f"check_compiled={check!r}: 'error', 'warn' or 'ignore'")

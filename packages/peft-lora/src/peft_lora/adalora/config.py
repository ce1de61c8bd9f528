"""The config of AdaLoRA: fields and defaults as in Hugging Face's PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import field_validator, model_validator

from peft_core.config import TargetedConfig

_ATTENTION = ("query", "key", "value", "output")


class AdaLoraConfig(TargetedConfig):
    """Adaptive low-rank adaptation, y = base(x) + s B (E ∘ A) x with s = lora_alpha / init_r, ranks chosen in training.

    The budget, the number of rows of E over all layers that are not zero, falls from `init_r` to `target_r` per layer
    on average, between the steps `tinit` and `total_step` - `tfinal` of the optimizer. What is kept is what matters
    most to the loss, wherever it is. transformers' `Trainer` needs nothing for it; another training loop says once,
    before it begins, `peft_core.drive(model, optimizer)`.

    Args:
        total_step: number of optimizer steps of the whole training. Required.
        init_r: rank of every layer at the beginning.
        target_r: rank that is left per layer, on average.
        tinit: steps before the first pruning.
        tfinal: steps at the end during which the ranks stay.
        deltaT: steps from one pruning to the next; what was pruned may grow again in between.
        beta1, beta2: how slowly the running averages of the sensitivity, and of its changes, forget; in (0, 1).
        orth_reg_weight: weight of the loss term that keeps the rows of A and the columns of B orthogonal.
        lora_alpha: numerator of the scaling s. (s is lora_alpha / (init_r + 0.00001), also after pruning.)
        lora_dropout: probability of dropout on what A reads, in training.
        init_lora_weights: True (A and B normal with deviation 0.02, E zero: the start is the base), or False (all
            normal with deviation 1: the adapter then changes the model from the start).
        rank_pattern: which of the `init_r` rows of a layer are kept, {path of the layer + ".lora_E": list of bools}.
            Written by the training; a config that has it is settled, and its ranks change no more.
        fan_in_fan_out: kept for files of other writers: how a layer stores its weight is seen from the layer.
        r: not used, as in HF PEFT: the ranks are `init_r` and `target_r`.

    The other fields are those of `TargetedConfig`.
    """

    peft_type: ClassVar[str] = "ADALORA"
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("bart", "opt", "t5"), (*_ATTENTION, "up", "down")),
        **dict.fromkeys(("deberta-v2", "roberta"), ("query", "key", "value", "dense")),
        "mt5": (*_ATTENTION, "gate", "up", "down"),
        "nemotron_h": _ATTENTION,
    }
    # Settings of LoRA that do nothing in HF PEFT's AdaLoRA, whatever a file says.
    inert_keys: ClassVar[Mapping[str, object]] = {
        "alpha_pattern": ...,
        "bias": "none",
        "corda_config": ...,
        "eva_config": ...,
        "loftq_config": ...,
        "lora_ga_config": ...,
        "megatron_core": "megatron.core",
        "qalora_group_size": ...,
        "use_rslora": ...,
    }

    r: int = 8
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    rank_pattern: dict[str, tuple[bool, ...]] | None = None
    fan_in_fan_out: bool = False

    def __init__(self, **data: Any) -> None:
        if data.get("r", 8) != 8:
            warnings.warn(
                f"r={data['r']!r} is not used by AdaLoRA: ranks begin at init_r and end at target_r on average",
                stacklevel=2,
            )
            del data["r"]
        super().__init__(**data)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        """HF's any other start than False is its True; ranks may be listed with an adapter's name at the end."""
        data.pop("r", None)
        if isinstance(data.get("init_lora_weights"), str):
            data["init_lora_weights"] = True
        pattern = data.get("rank_pattern")
        if isinstance(pattern, dict):
            data["rank_pattern"] = {_key(k): v for k, v in pattern.items()} or None
        return data

    # ---- values

    @field_validator("init_r", "target_r", "deltaT", "total_step")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("a positive integer")
        return value

    @field_validator("tinit", "tfinal", "orth_reg_weight")
    @classmethod
    def _not_negative(cls, value: float) -> float:
        if not 0 <= value < float("inf"):
            raise ValueError("a number from 0 on")
        return value

    @field_validator("beta1", "beta2")
    @classmethod
    def _between(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError("a number between 0 and 1, both excluded")
        return value

    @field_validator("lora_alpha")
    @classmethod
    def _alpha(cls, value: int | float) -> int | float:
        if value <= 0:
            raise ValueError("a positive number")
        return value

    @field_validator("lora_dropout")
    @classmethod
    def _probability(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("a probability, from 0 to below 1")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _rows_of_layers(cls, value: dict[str, tuple[bool, ...]] | None) -> dict[str, tuple[bool, ...]] | None:
        for key in value or ():
            if not key.endswith(".lora_E"):
                raise ValueError(f"the key {key!r} is not the path of a layer and '.lora_E'")
        return value or None

    # ---- rules across fields

    @model_validator(mode="after")
    def _schedule(self) -> AdaLoraConfig:
        if self.total_step is None:
            raise ValueError("AdaLoRA needs total_step, the number of optimizer steps of the whole training")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"no step is left for pruning: tinit={self.tinit} must be less than total_step - tfinal = "
                f"{self.total_step - self.tfinal}"
            )
        return self


def _key(key: Any) -> Any:
    head, dot, _ = key.rpartition(".") if isinstance(key, str) else (key, "", "")
    return head if dot and head.endswith(".lora_E") else key


__all__ = ["AdaLoraConfig"]

"""The config of LoRA: fields, their order and their defaults as in Hugging Face's PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peft_core.config import TargetedConfig
from peft_core.errors import ConfigError

NITER = re.compile(r"pissa_niter_[1-9][0-9]{0,3}", re.ASCII)
STARTS = (
    "gaussian",
    "eva",
    "olora",
    "pissa",
    "pissa_niter_[number of iterations]",
    "corda",
    "loftq",
    "orthogonal",
    "mica",
    "lora_ga",
)
AVAILABLE = ("gaussian", "orthogonal")
# These moved the base's weights when training began: such a file alone does not say what it computes.
MOVED_THE_BASE = ("olora", "pissa", "corda", "loftq", "lora_ga")


class LoraConfig(TargetedConfig):
    """Low-rank adaptation, y = base(x) + s B A x with s = lora_alpha / r.

    Args:
        target_modules: as in every method with targets. Left out, it means the layers customary for the model's type
            (mostly those of queries and values), or none where `target_parameters` names some. It may be empty next
            to `target_parameters` or `trainable_token_indices`.
        r: the rank.
        lora_alpha: numerator of the scaling s.
        lora_dropout: probability of dropout on what A reads, in training. Embeddings have none.
        fan_in_fan_out: kept for files of other writers: how a layer stores its weight is seen from the layer.
        bias: which of the base's own biases are trained as well: "none", "all", or those of the targets ("lora_only").
            The base keeps its biases; the adapter has its own.
        use_rslora: s = lora_alpha / √r.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1 / r, B zero),
            "orthogonal" (A and B random with B A = 0; linear layers and attention, even ranks only), or False
            (both random: the adapter then changes the model from the start).
        rank_pattern: exceptions from `r`, {key: rank}. A key is the path of a layer or of a single parameter, the end
            of one at a dot, or a regular expression for it.
        alpha_pattern: exceptions from `lora_alpha`, likewise.
        trainable_token_indices: rows of the input embedding to train, or {module name: rows}. A tied head follows.
        use_dora: learn the norm of each of the weight's rows apart from its direction.
        lora_bias: a learned bias next to B.
        target_parameters: names of single 2-D or 3-D parameters, such as stacked experts ("experts.down_proj").
        ensure_weight_tying: what is learned at one of two tied layers holds for both.

    The other fields are those of `TargetedConfig`.
    """

    peft_type: ClassVar[str] = "LORA"
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")
    # Model types whose customary targets are others.
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "btlm": ("output", "qkv"),
        "nemotron_h": ("query", "key", "value", "output"),
        "phi": ("query", "value", "up", "down"),
        "rwkv": ("key", "value", "receptance", "output"),
        "rwkv7": ("receptance", "key", "value", "output", "up", "down"),
    }
    allow_no_targets: ClassVar[bool] = True
    # Options that this package does not have, at the values that switch them off; settings of starts, which
    # have done their work when the file is written.
    inert_keys: ClassVar[Mapping[str, object]] = {
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "loftq_config": ...,
        "eva_config": ...,
        "corda_config": ...,
        "lora_ga_config": ...,
    }

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False

    def __init__(self, **data: Any) -> None:
        super().__init__(**_without_default_targets(data))
        start = self.init_lora_weights
        if isinstance(start, str) and start not in AVAILABLE:
            raise ConfigError(
                f"init_lora_weights={start!r} is not yet available in this version of peft-lora; "
                f"use True, False, {' or '.join(map(repr, AVAILABLE))}"
            )

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def resolve(self, **updates: Any) -> LoraConfig:
        """As the base class; a start that a file was written with stays as it is."""
        if updates.keys() <= type(self).model_fields.keys() and "init_lora_weights" not in updates:
            values = {name: getattr(self, name) for name in type(self).model_fields}
            return type(self).from_dict({**values, **updates})
        return super().resolve(**updates)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "the data") -> LoraConfig:
        """As the base class.

        Raises `ConfigError` too for starts that moved the base's weights: the tensors then are no adapter of
        the base as it was published.
        """
        self = super().from_dict(data, source=source)
        start = self.init_lora_weights
        if isinstance(start, str) and (start in MOVED_THE_BASE or NITER.fullmatch(start)):
            raise ConfigError(
                f"{source}: init_lora_weights={start!r} changed the base's weights when the training began, and the "
                "adapter's tensors count from there. Convert it to plain LoRA where it was trained: HF PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...) writes one that loads anywhere."
            )
        return self

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        return _without_default_targets(data)

    @classmethod
    def _switched_off(cls, data: dict[str, Any]) -> dict[str, Any]:
        optional = ("trainable_token_indices", "target_parameters", "rank_pattern", "alpha_pattern")
        return super()._switched_off({k: v for k, v in data.items() if not (k in optional and not v)})

    # ---- values

    @field_validator("r")
    @classmethod
    def _positive_rank(cls, value: int) -> int:
        if value < 1:
            raise ValueError("the rank is a positive integer")
        return value

    @field_validator("lora_alpha")
    @classmethod
    def _alpha(cls, value: int | float) -> int | float:
        if value == 0:
            raise ValueError("with lora_alpha=0 the adapter can never do anything")
        return value

    @field_validator("lora_dropout")
    @classmethod
    def _probability(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError("a probability, from 0 to below 1")
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _known_start(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and value not in STARTS and not NITER.fullmatch(value):
            raise ValueError(f"True, False, or one of {', '.join(STARTS)}")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _positive_ranks(cls, value: dict[str, int]) -> dict[str, int]:
        for key, rank in value.items():
            if rank < 1:
                raise ValueError(f"the rank of {key!r} is not a positive integer")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas(cls, value: dict[str, int | float]) -> dict[str, int | float]:
        for key, alpha in value.items():
            if alpha == 0:
                raise ValueError(f"with 0 for {key!r} the adapter can never do anything there")
        return value

    @field_validator("target_parameters", mode="before")
    @classmethod
    def _parameter_names(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) and name for name in value):
            raise ValueError("give a list of parameter names")
        if not value:
            raise ValueError("an empty list names nothing; leave the field out, or give names")
        return tuple(dict.fromkeys(value))

    @field_validator("trainable_token_indices")
    @classmethod
    def _token_indices(cls, value: Any) -> Any:
        if value is None:
            return None
        named = value if isinstance(value, dict) else {"": value}
        if not named:
            raise ValueError("an empty mapping names nothing; leave the field out, or give rows")
        for indices in named.values():
            if not indices:
                raise ValueError("an empty list selects no token; leave the field out, or give indices")
            if min(indices) < 0:
                raise ValueError("indices of tokens are integers from 0 on")
            if len(set(indices)) < len(indices):
                raise ValueError("a token is listed twice")
        return value

    # ---- rules across fields

    @model_validator(mode="after")
    def _rules(self) -> LoraConfig:
        if self.target_modules == () and not (self.target_parameters or self.trainable_token_indices):
            raise ValueError("target_modules is empty, and nothing else is named to be adapted")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora exclude each other")
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            raise ValueError("lora_bias goes with init_lora_weights=True or False only")
        if self.target_parameters:
            for name in ("lora_dropout", "use_dora", "lora_bias"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is not possible with target_parameters: a parameter has no input of its own; give "
                        "those layers an adapter of their own"
                    )
        return self


def _without_default_targets(data: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that are named take the place of the default modules."""
    if data.get("target_parameters") and data.get("target_modules") is None:
        return {**data, "target_modules": []}
    return dict(data)


__all__ = ["LoraConfig"]

"""The config of LoRA: fields, their order and their defaults as in Hugging Face's PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peft_core.config import TargetedConfig
from peft_core.errors import ConfigError
from peft_core.suggest import shown

from .start_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig

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
FROM_DATA = ("eva", "corda", "lora_ga")
# What these start as is no part of the adapter's delta: HF PEFT takes it out of the base's weights, and here it stays
# with the adapter and is subtracted.
ANCHORED = ("olora", "pissa", "corda", "lora_ga")
# The config of a start, and the start that has it.
START_OF = {"eva_config": "eva", "corda_config": "corda", "lora_ga_config": "lora_ga", "loftq_config": "loftq"}
VARIANTS = ("alora_invocation_tokens", "use_qalora")
# Ours, in files: the fields that describe an adapter whose tensors are written in another form.
STARTED_FROM = "started_from"


def is_anchored(init: bool | str) -> bool:
    """Whether adapters with this start keep the factors they started from, and subtract them."""
    return isinstance(init, str) and (init in ANCHORED or NITER.fullmatch(init) is not None)


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
            "orthogonal" (A and B random with B A = 0; linear layers and attention, even ranks only), False
            (both random: the adapter then changes the model from the start), one of those taken from the base's weights
            ("pissa", "pissa_niter_4", "olora", "mica"), or one of those from data ("eva", "corda", "lora_ga").
        eva_config, corda_config, lora_ga_config, loftq_config: settings of those starts, as objects or mappings.
        rank_pattern: exceptions from `r`, {key: rank}. A key is the path of a layer or of a single parameter, the end
            of one at a dot, or a regular expression for it.
        alpha_pattern: exceptions from `lora_alpha`, likewise.
        trainable_token_indices: rows of the input embedding to train, or {module name: rows}. A tied head follows.
        use_dora: learn the norm of each of the weight's rows apart from its direction.
        lora_bias: a learned bias next to B.
        target_parameters: names of single 2-D or 3-D parameters, such as stacked experts ("experts.down_proj").
        ensure_weight_tying: what is learned at one of two tied layers holds for both.
        alora_invocation_tokens: the adapter acts from the last occurrence of these tokens on (aLoRA; linear layers). In
            calls that do not show the prompt, `alora_offsets` says for each row how many of its last tokens are meant.
        use_qalora, qalora_group_size: A reads the means of groups of inputs (QA-LoRA; linear layers).
        layer_replication: ranges of the model's layers, [[first, end], ...], that make a deeper model; layers that
            occur twice share their weights and have adapters of their own.

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
    # Options that this package does not have, at the values that switch them off.
    inert_keys: ClassVar[Mapping[str, object]] = {"megatron_core": "megatron.core"}
    written_if_set: ClassVar[Set[str]] = frozenset({*START_OF, *VARIANTS, "qalora_group_size", "layer_replication"})

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
    loftq_config: LoftQConfig | None = None
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    alora_invocation_tokens: tuple[int, ...] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: tuple[tuple[int, int], ...] | None = None
    lora_bias: bool = False
    target_parameters: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False

    @property
    def request_arguments(self) -> tuple[str, ...]:  # type: ignore[override]
        """Where an invocation begins, for calls that do not show it."""
        return ("alora_offsets",) if self.alora_invocation_tokens else ()

    def __init__(self, **data: Any) -> None:
        super().__init__(**_without_default_targets(data))
        for name, start in START_OF.items():
            if getattr(self, name) is not None and self.init_lora_weights != start:
                raise ConfigError(
                    f"{name} is for init_lora_weights={start!r}, and that is {self.init_lora_weights!r}; leave one "
                    "of the two out"
                )

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    # ---- files

    def beside_tensors(self, *, inference_mode: bool | None = None) -> dict[str, Any]:
        """What an adapter's file holds. Where A0 and B0 are in its tensors, plain LoRA of twice the rank.

        Any reader of LoRA's files then computes the same; what the adapter is, is kept under a key of ours.
        """
        if not is_anchored(self.init_lora_weights):
            return super().beside_tensors(inference_mode=inference_mode)
        written = self.to_dict(inference_mode=inference_mode)
        names = [*_DOUBLED, "init_lora_weights", *(name for name in START_OF if name in written)]
        own = {name: written.pop(name) for name in names}
        return {**written, **_doubled(self), "init_lora_weights": True, STARTED_FROM: own}

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        if own := data.pop(STARTED_FROM, None):
            if not isinstance(own, dict) or not {*_DOUBLED, "init_lora_weights"} <= own.keys() <= _OWN:
                raise ConfigError(
                    f"{STARTED_FROM}: it holds the fields that an adapter was made with, not {shown(own)}"
                )
            restored = {**data, **own}
            config = cls.from_dict({name: restored[name] for name in ("use_rslora", *own) if name in restored})
            found = {name: data.get(name) for name in _DOUBLED}
            if not is_anchored(config.init_lora_weights) or found != _doubled(config):
                raise ConfigError(
                    f"{STARTED_FROM}: it describes {_doubled(config)}, and the file says {found}. One of the two was "
                    f"edited; remove {STARTED_FROM} to go on from the file as plain LoRA of that rank"
                )
            data = restored
        return _without_default_targets(data)

    @classmethod
    def _switched_off(cls, data: dict[str, Any]) -> dict[str, Any]:
        optional = ("trainable_token_indices", "target_parameters", "rank_pattern", "alpha_pattern", *START_OF)
        optional = (*optional, "alora_invocation_tokens", "layer_replication")
        # Settings of a start that was not used have done nothing.
        idle = [name for name, start in START_OF.items() if data.get("init_lora_weights") != start]
        return super()._switched_off({k: v for k, v in data.items() if not (k in idle or (k in optional and not v))})

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

    @field_validator("qalora_group_size")
    @classmethod
    def _positive_group(cls, value: int) -> int:
        if value < 1:
            raise ValueError("a positive integer")
        return value

    @field_validator("alora_invocation_tokens", "layer_replication")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("an empty list says nothing; leave the field out")
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
        if self.use_dora and self.init_lora_weights == "mica":
            raise ValueError("init_lora_weights='mica' and use_dora exclude each other: no reader has the two together")
        chosen = [name for name in VARIANTS if getattr(self, name)]
        for name in ("use_dora", "lora_bias", "target_parameters", "ensure_weight_tying"):
            if chosen and getattr(self, name):
                raise ValueError(f"{chosen[0]} and {name} exclude each other")
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other")
        if self.use_qalora and is_anchored(self.init_lora_weights):
            raise ValueError(
                f"use_qalora has no start {self.init_lora_weights!r}: its A does not read the layer's inputs"
            )
        if self.target_parameters:
            for name in ("lora_dropout", "use_dora", "lora_bias"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is not possible with target_parameters: a parameter has no input of its own; give "
                        "those layers an adapter of their own"
                    )
        return self


_DOUBLED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_OWN = {*_DOUBLED, *START_OF, "init_lora_weights"}


def _doubled(config: LoraConfig) -> dict[str, Any]:
    """Ranks twice as large, and alphas that leave every layer's s what it is."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": config.lora_alpha * factor,
        "rank_pattern": {key: 2 * rank for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: alpha * factor for key, alpha in config.alpha_pattern.items()},
    }


def _without_default_targets(data: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that are named take the place of the default modules."""
    if data.get("target_parameters") and data.get("target_modules") is None:
        return {**data, "target_modules": []}
    return dict(data)


__all__ = ["LoraConfig"]

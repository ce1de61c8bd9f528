"""The config of bottleneck adapters, and what the styles of the literature set in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peft_core import TargetedConfig

from .activations import ACTIVATIONS, SPELLINGS

Style = Literal["houlsby", "pfeiffer", "parallel", "scaled_parallel"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "houlsby": {"reduction_factor": 16, "non_linearity": "swish", "init_weights": "bert", "mh_adapter": True},
    "pfeiffer": {"reduction_factor": 16, "non_linearity": "relu", "init_weights": "bert", "mh_adapter": False},
    "parallel": {"reduction_factor": 2, "non_linearity": "relu", "init_weights": "mam_adapter", "mh_adapter": False},
}
"""What a style means for the fields that were not given; they are AdapterHub's choices."""


class BottleneckConfig(TargetedConfig):
    """Where adapters of the form up(f(down(u))) sit, what their input u is, and how large they are.

    With x the residual stream before a sub-layer and h the sub-layer's output (both (..., d)), each style changes
    the sum z = h + x, from which the model goes on:

    - `"houlsby"` (Houlsby et al. 2019, arXiv 1902.00751, section 2.1): z = h + x + s·Δ(h), after the attention and
      after the feed-forward network.
    - `"pfeiffer"` (Pfeiffer et al. 2020, arXiv 2005.00247, section 2.2.2 and appendix A.1): z = h + x + s·Δ(LN(h + x))
      after the feed-forward network, with the block's own norm LN where that stands behind the sum (BERT); where it
      stands before the sub-layer (GPT-2), without it.
    - `"parallel"`, `"scaled_parallel"` (He et al. 2021, arXiv 2110.04366, sections 3.2 and 4.6): z = h + x + s·Δ(x)
      at the feed-forward network, with s = 1 or 4.

    A field that is None has the style's value:

    Args:
        style: as above.
        reduction_factor: d divided by it is the width of the bottleneck, rounded down and at least 1. A mapping
            gives it by layer, {"0": 8, "default": 16}; layers are counted from 0 through all stacks of blocks,
            an encoder's before a decoder's.
        non_linearity: f, one of relu, gelu, gelu_new, swish (or silu), leaky_relu (or leakyrelu), tanh.
        scaling: s, a number, or "learned" for a trained scalar per adapter that starts at 1.
        init_weights: "bert", both projections from N(0, 0.02²); "houlsby", from N(0, 0.01²) cut off at two
            deviations; "mam_adapter", `down` as `nn.Linear` starts and `up` at zero, so that the start is the
            base's function. Biases start at zero.
        mh_adapter, output_adapter: whether attention and feed-forward network get adapters.
        cross_adapter: whether a decoder's attention over its encoder gets them too.
        leave_out: numbers of layers without adapters.
        ln_before, ln_after: trained layer norms (eps 1e-5) on u and on Δ.
        dropout: of s·Δ, in training.
        target_modules: linear layers to put adapters behind, y + s·Δ(y), instead of those of the model's type; for
            models whose type is not known. Only for style "houlsby", which needs to know nothing else.

    Raises:
        ConfigError: with all problems, for unknown names, sizes that are not positive, or fields at odds.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    style: Style = "houlsby"
    reduction_factor: int | float | dict[str, int | float] | None = None
    non_linearity: str | None = None
    scaling: int | float | Literal["learned"] | None = None
    init_weights: Literal["bert", "houlsby", "mam_adapter"] | None = None
    mh_adapter: bool | None = None
    output_adapter: bool | None = None
    cross_adapter: bool = False
    leave_out: tuple[int, ...] = ()
    ln_before: bool = False
    ln_after: bool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @classmethod
    def houlsby(cls, **fields: Any) -> BottleneckConfig:
        """Adapters behind attention and feed-forward network (Houlsby et al. 2019). Raises `ConfigError`."""
        return cls(style="houlsby", **fields)

    @classmethod
    def pfeiffer(cls, **fields: Any) -> BottleneckConfig:
        """One adapter per block, on the sum behind the feed-forward network (Pfeiffer et al. 2020).

        Raises `ConfigError`.
        """
        return cls(style="pfeiffer", **fields)

    @classmethod
    def parallel(cls, **fields: Any) -> BottleneckConfig:
        """Adapters beside the feed-forward network (He et al. 2021, table 1). Raises `ConfigError`."""
        return cls(style="parallel", **fields)

    @classmethod
    def scaled_parallel(cls, **fields: Any) -> BottleneckConfig:
        """As `parallel`, scaled by 4 (He et al. 2021, section 4.6). Raises `ConfigError`."""
        return cls(style="scaled_parallel", **fields)

    @field_validator("reduction_factor", mode="before")
    @classmethod
    def _factors(cls, value: Any) -> Any:
        for factor in value.values() if isinstance(value, Mapping) else () if value is None else (value,):
            if not (isinstance(factor, (int, float)) and not isinstance(factor, bool)):
                raise ValueError("give a number, or a mapping from layers to numbers")
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError("the width of the layer is divided by it: give a finite number greater than 0")
        for key in value if isinstance(value, Mapping) else ():
            if key != "default" and not (key.isascii() and key.isdigit()):
                raise ValueError(f'its keys are numbers of layers, as strings, or "default", not {key!r}')
        return value

    @field_validator("non_linearity")
    @classmethod
    def _activation(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name = SPELLINGS.get(value.lower(), value.lower())
        if name not in ACTIVATIONS:
            raise ValueError(f"unknown activation function; the known ones are {', '.join((*ACTIVATIONS, *SPELLINGS))}")
        return name

    @field_validator("scaling")
    @classmethod
    def _finite(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise ValueError("it must be finite")
        return value

    @field_validator("leave_out")
    @classmethod
    def _layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in value):
            raise ValueError("layers are counted from 0")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _either_roles_or_targets(self) -> BottleneckConfig:
        if self.target_modules is None:
            given = [
                name for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if getattr(self, name)
            ]
            if given:
                raise ValueError(f"{', '.join(given)}: these limit target_modules; to leave out layers, give leave_out")
            full = self.complete()
            if not (full.mh_adapter or full.output_adapter or full.cross_adapter):
                raise ValueError("mh_adapter, output_adapter and cross_adapter are all off: nothing would be adapted")
            return self
        if self.style != "houlsby":
            raise ValueError(
                f"style {self.style!r} needs the residual stream around a block's sub-layers, which target_modules "
                'does not tell; leave target_modules out, or take style "houlsby"'
            )
        given = [name for name in ("mh_adapter", "output_adapter") if getattr(self, name) is not None]
        given += [name for name in ("cross_adapter", "leave_out") if getattr(self, name)]
        if isinstance(self.reduction_factor, dict):
            given.append("reduction_factor as a mapping")
        if given:
            raise ValueError(f"{', '.join(given)}: these choose among the sub-layers of blocks, target_modules by name")
        return self

    def complete(self) -> BottleneckConfig:
        """This config with the style's values in the fields that were left open."""
        preset = {**PRESETS[self.style.removeprefix("scaled_")], "output_adapter": True}
        preset["scaling"] = 4.0 if self.style == "scaled_parallel" else 1.0
        if self.target_modules is not None:
            del preset["mh_adapter"], preset["output_adapter"]
        missing = {name: value for name, value in preset.items() if getattr(self, name) is None}
        return self.resolve(**missing) if missing else self

    def factor(self, layer: int) -> float:
        """The reduction factor of a layer. Raises `KeyError` where a mapping has neither the layer nor a default."""
        factor = self.complete().reduction_factor
        if not isinstance(factor, dict):
            assert factor is not None
            return factor
        return factor[str(layer)] if str(layer) in factor else factor["default"]

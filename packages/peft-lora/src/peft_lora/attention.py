"""LoRA on `nn.MultiheadAttention`: on its packed input projection (3d, d) and its output projection (d, d).

The module's kernel reads both weights itself, so the adapter is applied to the weights. (HF PEFT adds the
output projection's part twice; here it is added once, as the formula says.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter, WeightAdapter, as_compute
from peft_core.layers import AttentionLayer, BaseLayer, Params

from .linear import add_bias
from .lowrank import fitted
from .settings import Settings, start


class Factors(nn.Module):
    """A (r, in), B (out, r) and perhaps c (out,) of one projection inside the module."""

    def __init__(self, layer: BaseLayer, settings: Settings, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lora_A = layer.parameter(settings.r, in_features)
        self.lora_B = layer.parameter(out_features, settings.r)
        self.lora_bias: nn.Parameter | None = layer.parameter(out_features) if settings.bias else None


class LoraAttention(WeightAdapter):
    """Factors of the input projection and, under `out_proj`, of the output projection.

    Raises `TargetError` where queries, keys and values have different widths (there is no packed projection then),
    and for `lora_bias` where the module has no biases.
    """

    def __init__(self, layer: AttentionLayer, settings: Settings) -> None:
        super().__init__(layer)
        if layer.module.in_proj_weight is None:
            raise layer.refuse("its queries, keys and values have different widths; only equal ones can be adapted")
        if settings.bias and layer.module.in_proj_bias is None:
            raise layer.refuse("lora_bias=True acts through the layer's own bias, and it has none; leave lora_bias off")
        d = layer.embed_dim
        self.settings = settings
        self.starts_as_base = settings.init is not False
        self.scaling = settings.scaling
        self.lora_A = layer.parameter(settings.r, d)
        self.lora_B = layer.parameter(3 * d, settings.r)
        self.lora_bias: nn.Parameter | None = layer.parameter(3 * d) if settings.bias else None
        self.out_proj = Factors(layer, settings, d, d)

    def _projections(self) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor | None]]:
        yield "in_proj_weight", "in_proj_bias", self.lora_A, self.lora_B, self.lora_bias
        out = self.out_proj
        yield "out_proj.weight", "out_proj.bias", out.lora_A, out.lora_B, out.lora_bias

    def reset_parameters(self) -> None:
        for _, _, a, b, c in self._projections():
            start(a, b, c, self.settings.init, self.settings.r)

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        values = {slot: torch.zeros_like(tensor) for slot, tensor in self.state().items()}
        if other is None:
            return values
        if not isinstance(other, LoraAttention) or (self.lora_bias is None and other.lora_bias is not None):
            return dict(super().values_like(other))
        ratio = other.scaling / self.scaling
        for prefix, theirs in (("", other), ("out_proj.", other.out_proj)):
            a, b = fitted(self, (theirs.lora_A, theirs.lora_B), self.settings.r)
            values |= {f"{prefix}lora_A": a, f"{prefix}lora_B": b * ratio}
            if theirs.lora_bias is not None:
                values[f"{prefix}lora_bias"] = theirs.lora_bias * ratio
        return values

    def merge(self, params: Params) -> Params:
        params = dict(params)
        for name, bias_name, a, b, c in self._projections():
            weight = params[name]
            params[name] = torch.addmm(weight, as_compute(b, weight), as_compute(a, weight), alpha=self.scaling)
            params = add_bias(params, c, self.scaling, self.layer, bias_name)
        return params

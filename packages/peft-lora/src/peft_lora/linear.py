"""LoRA on linear layers: y = W x + b + s (B A x + c).

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_core.adapter import as_compute, dropout
from peft_core.errors import MergeError
from peft_core.layers import BaseLayer, Params

from .lowrank import LowRank
from .settings import Settings


class LoraLinear(LowRank):
    """A (r, in), B (out, r), and perhaps c (out,), on a layer of kind "linear"."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, layer: BaseLayer, settings: Settings) -> None:
        in_features, out_features = _sizes(layer)
        super().__init__(layer, settings, (settings.r, in_features), (out_features, settings.r))
        self.out_features = out_features
        self.lora_bias: nn.Parameter | None = layer.parameter(out_features) if settings.bias else None
        self.dropout = dropout(settings.dropout)

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        return self.add(out, x if self.dropout is None else self.dropout(x))

    def delta(self, x: Tensor) -> Tensor:
        return self.accumulate(x.new_zeros((*x.shape[:-1], self.out_features)), x)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` plus the adapter's part for an input that is dropped out already, or not at all."""
        if x.dim() != 2:
            rows = self.add(out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]))
            return rows.view(out.shape)
        a, b = self.factors()
        hidden = torch.mm(x, as_compute(a, x).t())
        # `hidden` differs from `out` in dtype only where the base computes in another dtype than its input's.
        out = torch.addmm(out, as_compute(hidden, out), as_compute(b, out).t(), alpha=self.scaling)
        if self.lora_bias is not None:
            out = torch.add(out, as_compute(self.lora_bias, out), alpha=self.scaling)
        return out

    def weight_delta(self) -> Tensor:
        a, b = self.factors()
        return (b @ a) * self.scaling

    def merge(self, params: Params) -> Params:
        return add_bias(super().merge(params), self.lora_bias, self.scaling, self.layer)


def add_bias(params: Params, bias: Tensor | None, scaling: float, layer: BaseLayer, name: str = "bias") -> Params:
    """`params` with s·c on the layer's bias. Raises `MergeError` where it has none to take it."""
    if bias is None:
        return params
    if name not in params:
        raise MergeError(
            f"{layer.path}: the adapter has a bias (lora_bias=True) and the layer has none to merge it into; keep the "
            "adapter attached, or give the layer a bias of zeros before adapting it"
        )
    return {**params, name: params[name] + (bias * scaling).to(params[name].dtype)}


def _sizes(layer: BaseLayer) -> tuple[int, int]:
    in_features, out_features = layer.in_features, layer.out_features  # type: ignore[attr-defined]
    return int(in_features), int(out_features)

"""LoRA on linear layers: y = W x + b + s (B A x + c).

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core.adapter import as_compute, dropout
from peft_core.errors import MergeError
from peft_core.layers import BaseLayer, Params
from peft_core.link import Link

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

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """Two batched products, whatever the number of adapters and their ranks."""
        x, *rest = args
        if rest or kwargs or True in [adapter.training and adapter.dropout is not None for adapter in adapters]:
            return NotImplemented
        return add_rows(base(x), x, adapters, index, base)

    def weight_delta(self) -> Tensor:
        a, b = self.factors()
        return (b @ a) * self.scaling

    def merge(self, params: Params) -> Params:
        return add_bias(super().merge(params), self.lora_bias, self.scaling, self.layer)


def add_rows(out: Tensor, x: Tensor, adapters: Sequence[LoraLinear], index: Tensor, base: Link) -> Tensor:
    """`out` (rows, ..., out) plus, for each row of x, the part of its adapter; `index` (rows,) is -1 for none."""

    def make() -> tuple[Tensor, Tensor, Tensor | None]:
        a, b = zip(*(adapter.factors() for adapter in adapters), strict=True)
        rank, own = max(len(factor) for factor in a), index % (len(adapters) + 1)  # last of all: none, which is zero
        none_a, none_b = x.new_zeros(rank, x.shape[-1]), out.new_zeros(out.shape[-1], rank)
        padded = [F.pad(as_compute(factor, x), (0, 0, 0, rank - len(factor))) for factor in a]
        scaled = [
            F.pad(as_compute(factor, out) * adapter.scaling, (0, rank - factor.shape[1]))
            for adapter, factor in zip(adapters, b, strict=True)
        ]
        biases = [adapter.lora_bias for adapter in adapters]
        c = None
        if any(bias is not None for bias in biases):
            none_c = out.new_zeros(out.shape[-1])
            found = [
                none_c if bias is None else as_compute(bias, out) * adapter.scaling
                for adapter, bias in zip(adapters, biases, strict=True)
            ]
            c = torch.stack([*found, none_c])[own].unsqueeze(1)
        return torch.stack([*padded, none_a])[own].mT, torch.stack([*scaled, none_b])[own].mT, c

    tensors: list[Any] = []
    for adapter in adapters:
        tensors += adapter.own()
    a, b, c = base.remembered("lora rows", (base.request.rows, len(index), x.dtype, out.dtype), tensors, make)
    hidden = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), a)
    flat = torch.baddbmm(out.reshape(len(out), -1, out.shape[-1]), as_compute(hidden, out), b)
    return (flat if c is None else flat + c).view(out.shape)


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

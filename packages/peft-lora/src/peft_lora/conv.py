"""LoRA on convolutions: A is a convolution like the layer's own with r output channels, B a 1 × 1 one on top.

The merged kernel is W[o] + s Σ_r B[o, r] A[r]. With groups, A still reads all input channels (as in HF PEFT's
files), so the sum is not a grouped kernel and there is no merged form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_core.adapter import as_compute, dropout
from peft_core.errors import MergeError
from peft_core.layers import ConvLayer, Params

from .linear import add_bias
from .lowrank import LowRank
from .settings import Settings


class LoraConv(LowRank):
    """A (r, in, *kernel), B (out, r / groups, 1, ...), and perhaps c (out,)."""

    layer: ConvLayer
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, layer: ConvLayer, settings: Settings) -> None:
        if settings.r % layer.groups:
            raise layer.refuse(f"its {layer.groups} groups do not divide the rank {settings.r}; choose another rank")
        a = (settings.r, layer.in_features, *layer.kernel_size)
        b = (layer.out_features, settings.r // layer.groups, *(1,) * len(layer.kernel_size))
        super().__init__(layer, settings, a, b)
        self.lora_bias: nn.Parameter | None = layer.parameter(layer.out_features) if settings.bias else None
        self.dropout = dropout(settings.dropout)

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        return self.add(out, x if self.dropout is None else self.dropout(x))

    def delta(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        hidden = self.layer.convolve(x, as_compute(a, x), groups=1)
        b = as_compute(b, hidden) * self.scaling
        c = None if self.lora_bias is None else as_compute(self.lora_bias, hidden) * self.scaling
        return _pointwise(b)(hidden, b, c, groups=self.layer.groups)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` plus the adapter's part for an input that is dropped out already, or not at all."""
        return out + as_compute(self.delta(x), out)

    def weight_delta(self) -> Tensor:
        if self.layer.groups > 1:
            raise MergeError(
                f"{self.layer.path}: its convolution has {self.layer.groups} groups, and the adapter reads all input "
                "channels, so their sum is not a kernel of this layer; keep the adapter attached"
            )
        a, b = self.factors()
        return torch.einsum("or,r...->o...", b.flatten(1), a) * self.scaling

    def merge(self, params: Params) -> Params:
        return add_bias(super().merge(params), self.lora_bias, self.scaling, self.layer)


def _pointwise(kernel: Tensor) -> Callable[..., Tensor]:
    return (torch.conv1d, torch.conv2d, torch.conv3d)[kernel.dim() - 3]

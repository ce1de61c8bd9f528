"""Trained biases of the base (`bias="all"` or "lora_only"). The base keeps its own; the adapter has another."""

from __future__ import annotations

from torch import Tensor, nn

from peft_core.adapter import Adapter, DeltaAdapter, WeightAdapter, as_compute
from peft_core.layers import BaseLayer, ConvLayer, LinearLayer, Params


class BiasShift(DeltaAdapter):
    """b' on a linear layer or a convolution, as the difference b' - b on the output: no order among adapters."""

    def __init__(self, layer: LinearLayer | ConvLayer) -> None:
        super().__init__(layer)
        stored = layer.module.get_parameter("bias")
        self.bias = layer.parameter(*stored.shape)
        spatial = len(layer.kernel_size) if isinstance(layer, ConvLayer) else 0
        self.channels = (stored.shape[0], *(1,) * spatial)

    def reset_parameters(self) -> None:
        copy_bias(self.bias, self.layer, "bias")

    def shift(self) -> Tensor:
        """b' - b (out,)."""
        return self.bias - self.layer.module.get_parameter("bias").to(self.bias.dtype)

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        return out + as_compute(self.shift(), out).view(self.channels)

    def delta(self, x: Tensor) -> Tensor:
        return as_compute(self.shift(), x).view(self.channels)

    def merge(self, params: Params) -> Params:
        return {**params, "bias": params["bias"] + self.shift().to(params["bias"].dtype)}


class BiasReplaced(WeightAdapter):
    """b' of any other module, which computes with it in its own way."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        (self.name,) = layer.request.names
        self.bias = layer.parameter(*layer.module.get_parameter(self.name).shape)

    def reset_parameters(self) -> None:
        copy_bias(self.bias, self.layer, self.name)

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {self.name.rpartition(".")[2]: (self, "bias")}

    def merge(self, params: Params) -> Params:
        below = params[self.name]
        shift = self.bias - self.layer.module.get_parameter(self.name).to(self.bias.dtype)
        return {**params, self.name: below + shift.to(below.dtype)}


def copy_bias(bias: Tensor, layer: BaseLayer, name: str) -> None:
    """Start from the layer's own values."""
    stored = layer.module.get_parameter(name)
    if not (stored.is_meta or bias.is_meta):
        bias.copy_(stored)


def own_bias(layer: BaseLayer) -> Adapter:
    """The adapter of the bias that `layer.request.names` names."""
    if isinstance(layer, (LinearLayer, ConvLayer)) and layer.request.names == ("bias",):
        return BiasShift(layer)
    return BiasReplaced(layer)

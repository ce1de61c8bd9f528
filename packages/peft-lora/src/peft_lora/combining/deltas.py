"""What an adapter of any method adds to its layer's weights, in the form that costs least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_core import Adapter, CombineError, MergeError
from peft_lora.attention import LoraAttention
from peft_lora.conv import LoraConv
from peft_lora.lowrank import LowRank

from .low_rank import Product

Delta = Product | Tensor


@dataclass(frozen=True)
class Matrix:
    """Which matrix of a layer a LoRA adapts: the parameters it changes, and where its factors are."""

    weight: str
    bias: str
    prefix: str = ""
    embedding: bool = False

    def flat(self, delta: Tensor) -> Tensor:
        """A delta in the weight's shape as (out, in): kernels flattened, tables turned."""
        return delta.t() if self.embedding else delta.flatten(1)


def matrices(adapter: Adapter) -> tuple[Matrix, ...]:
    """The matrices of a layer that a LoRA there would have factors for.

    Raises `CombineError` for layers whose weights a LoRA does not adapt.
    """
    layer = adapter.layer
    if layer.request.names or layer.kind not in ("linear", "conv", "embedding", "attention"):
        raise CombineError(
            f"{layer.path}: what an adapter does to a {type(layer.module).__name__}, or to single parameters, has no "
            "form that a LoRA could take; combine adapters without it"
        )
    if layer.kind == "attention":
        return (
            Matrix("in_proj_weight", "in_proj_bias"),
            Matrix("out_proj.weight", "out_proj.bias", prefix="out_proj."),
        )
    return (Matrix("weight", "bias", embedding=layer.kind == "embedding"),)


def changes(adapter: Adapter) -> Mapping[str, Tensor]:
    """The parameters that an adapter changes, as differences in float32 or wider. Raises `CombineError`."""
    layer = adapter.layer
    params = {
        name: value.detach().to(torch.promote_types(value.dtype, torch.float32))
        for name, value in layer.params().items()
    }
    try:
        merged = adapter.merge(dict(params))
    except MergeError as error:
        raise CombineError(f"{layer.path}: there is no delta to combine: {error}") from error
    return {name: value - params[name] for name, value in merged.items() if value is not params.get(name)}


def products(adapter: Adapter) -> dict[str, Product] | None:
    """The deltas of a LoRA by weight, as the products they are; None for adapters of another kind."""
    if isinstance(adapter, LowRank) and not (type(adapter) is LoraConv and adapter.layer.groups > 1):
        a, b = adapter.factors()
        return {"weight": Product(_wide(b.flatten(1)) * adapter.scaling, _wide(a.flatten(1)))}
    if type(adapter) is LoraAttention:
        return {weight: Product(_wide(b) * adapter.scaling, _wide(a)) for weight, _, a, b, _ in adapter._projections()}
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

"""A layer's weight as the matrix that B A is added to, and factors in the form that files have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_core.errors import CheckpointError
from peft_core.layers import BaseLayer, ConvLayer, EmbeddingLayer


def matrix(layer: BaseLayer) -> Tensor:
    """The weight (out, in), in float32 or wider; detached.

    Kernels are flattened, (out, in · kernel); an embedding's table is turned, (dimension, vocabulary).

    Raises `CheckpointError` where the weight has no values, `TargetError` where they are not finite.
    """
    weight = layer.params()["weight"].detach()
    if weight.is_meta:
        raise CheckpointError(f"{layer.path}: its weight is on the meta device; load the base's weights first")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not torch.isfinite(weight).all():
        raise layer.refuse("its weight holds NaN or infinity, so it has no decomposition to start from")
    return weight.t() if isinstance(layer, EmbeddingLayer) else weight.flatten(1)


def shape(layer: BaseLayer) -> tuple[int, int]:
    """Shape of `matrix(layer)`."""
    if isinstance(layer, EmbeddingLayer):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, ConvLayer):
        return layer.out_features, layer.in_features * math.prod(layer.kernel_size)
    in_features, out_features = layer.in_features, layer.out_features  # type: ignore[attr-defined]
    return int(out_features), int(in_features)


def anchored(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """[A; A] and [B, -B]: the factors (r, in) and (out, r) of a start that is to count as nothing."""
    return {"lora_A": torch.cat((a, a)), "lora_B": torch.cat((b, -b), 1)}

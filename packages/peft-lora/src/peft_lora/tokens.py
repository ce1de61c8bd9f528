"""Trained rows of an embedding (`trainable_token_indices`), and of a head tied to it.

The adapter holds the rows themselves (their values, not a difference), in the order of the config's indices. The table
is not touched and not copied: rows of the output are chosen by looking each id up among the indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core.adapter import Adapter, as_compute
from peft_core.layers import BaseLayer, EmbeddingLayer, LinearLayer, Params
from peft_core.link import Link


class _Rows(Adapter):
    """Rows (n, d) that replace those of `indices` in the layer's weight (any, d)."""

    def __init__(self, layer: BaseLayer, indices: Sequence[int]) -> None:
        super().__init__(layer)
        weight = layer.module.get_parameter("weight")
        too_large = [index for index in indices if index >= weight.shape[0]]
        if too_large:
            raise layer.refuse(f"trainable_token_indices has {too_large[:10]}, and it has {weight.shape[0]} rows")
        order = sorted(range(len(indices)), key=lambda position: indices[position])
        # On the layer's device even where the adapter is built elsewhere: they are known, not loaded.
        self.register_buffer("indices", torch.tensor(indices, device=weight.device), persistent=False)
        self.register_buffer("order", torch.tensor(order, device=weight.device), persistent=False)
        self.register_buffer("ordered", torch.tensor(sorted(indices), device=weight.device), persistent=False)
        self.indices: Tensor
        self.order: Tensor
        self.ordered: Tensor

    @property
    def rows(self) -> Tensor:
        """The rows (n, d)."""
        raise NotImplementedError

    def merge(self, params: Params) -> Params:
        weight = params["weight"]
        return {**params, "weight": weight.index_copy(0, self.indices, self.rows.to(weight.dtype))}


class _OwnRows(_Rows):
    def __init__(self, layer: BaseLayer, indices: Sequence[int]) -> None:
        super().__init__(layer, indices)
        self.trainable_tokens_delta = layer.parameter(len(indices), layer.module.get_parameter("weight").shape[1])

    @property
    def rows(self) -> Tensor:
        return self.trainable_tokens_delta

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        if other is None:
            weight = self.layer.module.get_parameter("weight")
            return {"trainable_tokens_delta": weight.index_select(0, self.indices)}
        if not isinstance(other, type(self)) or not torch.equal(other.indices, self.indices):
            return dict(super().values_like(other))
        return {"trainable_tokens_delta": other.trainable_tokens_delta}

    def reset_parameters(self) -> None:
        weight = self.layer.module.get_parameter("weight")
        if not (weight.is_meta or self.trainable_tokens_delta.is_meta):
            self.trainable_tokens_delta.copy_(weight.index_select(0, self.indices))


class EmbeddingRows(_OwnRows):
    """Trained rows of an embedding."""

    def __init__(self, layer: EmbeddingLayer, indices: Sequence[int]) -> None:
        super().__init__(layer, indices)
        padding = layer.module.padding_idx
        # No gradient for the padding row, as in the embedding itself.
        self.padding = indices.index(padding) if padding in indices else None

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return replaced(self, self.layer, base(*args, **kwargs), args[0], self.padding)


class HeadRows(_OwnRows):
    """Trained rows of a head: output features with weights of their own."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return recomputed(self, base, base(*args, **kwargs), args[0])


class _TiedRows(_Rows):
    """The rows of another module's adapter, for a module that shares its weight. Has no tensors of its own."""

    def __init__(self, layer: BaseLayer, indices: Sequence[int], adapters: Mapping[str, Adapter], path: str) -> None:
        super().__init__(layer, indices)
        self.adapters = adapters
        self.path = path

    @property
    def rows(self) -> Tensor:
        return cast(_OwnRows, self.adapters[self.path]).trainable_tokens_delta

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        return {}

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {}


class TiedEmbeddingRows(_TiedRows):
    """As `EmbeddingRows`, with another module's rows."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return replaced(self, self.layer, base(*args, **kwargs), args[0], None)


class TiedHeadRows(_TiedRows):
    """As `HeadRows`, with an embedding's rows."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return recomputed(self, base, base(*args, **kwargs), args[0])


def replaced(adapter: _Rows, layer: BaseLayer, out: Tensor, ids: Tensor, padding: int | None) -> Tensor:
    """An embedding's output (..., d) with the rows of the adapter's ids (...) in place."""
    at = torch.searchsorted(adapter.ordered, ids.to(adapter.ordered.dtype)).clamp_max(adapter.ordered.numel() - 1)
    hit = adapter.ordered[at] == ids
    rows = as_compute(F.embedding(adapter.order[at], adapter.rows, padding_idx=padding), out)
    scale = layer.scale if isinstance(layer, EmbeddingLayer) else None
    if scale is not None:
        rows = as_compute(rows * scale, out)
    return torch.where(hit.unsqueeze(-1), rows, out)


def recomputed(adapter: _Rows, base: Link, out: Tensor, x: Tensor) -> Tensor:
    """A linear layer's output (..., out) with the adapter's output features in place."""
    bias = base.params().get("bias")
    bias = None if bias is None else as_compute(bias.index_select(0, adapter.indices), x)
    values = F.linear(x, as_compute(adapter.rows, x), bias)
    return out.index_copy(-1, adapter.indices, as_compute(values, out))


def own_rows(layer: BaseLayer, indices: Sequence[int]) -> Adapter:
    """The adapter of a layer's own rows. Raises `TargetError` for a layer that is no embedding and no head."""
    if isinstance(layer, EmbeddingLayer):
        return EmbeddingRows(layer, indices)
    if isinstance(layer, LinearLayer):
        return HeadRows(layer, indices)
    raise layer.refuse("trainable_token_indices is for embeddings and linear heads")


def tied_rows(layer: BaseLayer, indices: Sequence[int], adapters: Mapping[str, Adapter], path: str) -> Adapter:
    """The adapter of a layer that shares its weight with the one at `path`."""
    if isinstance(layer, EmbeddingLayer):
        return TiedEmbeddingRows(layer, indices, adapters, path)
    return TiedHeadRows(layer, indices, adapters, path)

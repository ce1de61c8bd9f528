"""LoRA on embeddings: row v of the table W (vocabulary, d) becomes W[v] + s (B A)ᵀ[v].

`embed_scale`, which some models put on the embedding's output, is put on the adapter's part as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter, DeltaAdapter, as_compute
from peft_core.errors import CheckpointMismatchError
from peft_core.layers import BaseLayer, EmbeddingLayer, LinearLayer

from .lowrank import LowRank
from .settings import Settings


class LoraEmbedding(LowRank):
    """A (r, vocabulary), B (d, r). There is no dropout: nothing is multiplied with A."""

    names = ("lora_embedding_A", "lora_embedding_B")

    layer: EmbeddingLayer
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(self, layer: EmbeddingLayer, settings: Settings) -> None:
        if layer.module.max_norm is not None:
            raise layer.refuse("it renormalises its rows when they are read (max_norm), which leaves no merged form")
        super().__init__(layer, settings, (settings.r, layer.num_embeddings), (layer.embedding_dim, settings.r))
        self.dropout = None

    def reset_parameters(self) -> None:
        if self.settings.init not in (True, False, "gaussian"):
            super().reset_parameters()
            return
        if self.settings.init is False:
            nn.init.normal_(self.a)
        else:
            nn.init.zeros_(self.a)
        nn.init.normal_(self.b)

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        return self.add(out, x)

    def delta(self, x: Tensor) -> Tensor:
        return self.delta_at(self.layer, x)

    def delta_at(self, layer: EmbeddingLayer, x: Tensor) -> Tensor:
        """The delta of `layer`, this adapter's own or one that shares its table."""
        a, b = self.factors()
        rows = layer.lookup(x, a.t())
        delta = rows @ (as_compute(b, rows).t() * self.scaling)
        return delta if layer.scale is None else delta * layer.scale

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` plus the adapter's part."""
        return out + as_compute(self.delta(x), out)

    def weight_delta(self) -> Tensor:
        a, b = self.factors()
        return (a.t() @ b.t()) * self.scaling


class _Tied(DeltaAdapter):
    """The adapter of a layer whose weight is an embedding's table. Nothing of its own is trained.

    Files hold its factors all the same, as other readers expect.
    """

    def __init__(self, layer: BaseLayer, adapters: Mapping[str, Adapter], path: str) -> None:
        """`adapters` will hold the embedding's adapter under `path` (it may be built later than this one)."""
        super().__init__(layer)
        self.adapters = adapters
        self.path = path

    @property
    def source(self) -> LoraEmbedding:
        """The embedding's adapter."""
        return cast(LoraEmbedding, self.adapters[self.path])

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        return {} if other is None or isinstance(other, _Tied) else dict(super().values_like(other))

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take; raises `CheckpointMismatchError` where the two sets of a file are not one."""
        for slot, mine in self.state().items():
            theirs = tensors[slot]
            if theirs.shape != mine.shape or not (
                mine.is_meta or theirs.is_meta or torch.allclose(theirs.to(mine), mine, rtol=1e-2, atol=1e-6)
            ):
                raise CheckpointMismatchError(
                    f"{self.layer.path}.{slot}: ensure_weight_tying says that tied layers share one adapter, but the "
                    "file holds two different ones; set ensure_weight_tying to false in its config to load both"
                )


class TiedLinear(_Tied):
    """A head tied to an embedding: A (r, in) = B_embeddingᵀ, B (out, r) = A_embeddingᵀ."""

    layer: LinearLayer

    @property
    def lora_A(self) -> Tensor:
        return self.source.b.t()

    @property
    def lora_B(self) -> Tensor:
        return self.source.a.t()

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {"lora_A": (self, "lora_A"), "lora_B": (self, "lora_B")}

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        hidden = torch.matmul(x, as_compute(self.lora_A, x).t()) * self.source.scaling
        return out + torch.matmul(as_compute(hidden, out), as_compute(self.lora_B, out).t())

    def delta(self, x: Tensor) -> Tensor:
        return self.accumulate(x.new_zeros((*x.shape[:-1], self.layer.out_features)), x)

    def weight_delta(self) -> Tensor:
        return self.source.weight_delta()


class TiedEmbedding(_Tied):
    """An embedding that shares its table with another one."""

    layer: EmbeddingLayer

    @property
    def lora_embedding_A(self) -> Tensor:
        return self.source.a

    @property
    def lora_embedding_B(self) -> Tensor:
        return self.source.b

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {name: (self, name) for name in ("lora_embedding_A", "lora_embedding_B")}

    def delta(self, x: Tensor) -> Tensor:
        return self.source.delta_at(self.layer, x)

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        return out + as_compute(self.delta(x), out)

    def weight_delta(self) -> Tensor:
        return self.source.weight_delta()

"""DoRA: the weight's rows have learned norms m, and directions that LoRA moves.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353. Equation 5,
y = m / ‖W + sBA‖ · (W + sBA) x + b, and section 4.3: the norm counts as a constant in the backward pass.

The sum W + sBA is never formed. With g = m / ‖W + sBA‖ the output is g ∘ (W x + s B A x) + b, and

    ‖W_i + s (BA)_i‖² = ‖W_i‖² + 2 s B_i · (A W_iᵀ) + s² B_i (A Aᵀ) B_iᵀ,

where the first term is constant while the base is, and the others cost as much as r more inputs.

Stacked with other adapters it adds its change of the layer's own weight, g ∘ (W + sBA) - W, to theirs.

"Rows" are the weight's outputs: rows of a linear layer, kernels of a convolution, columns of an embedding's table.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter, as_compute
from peft_core.layers import BaseLayer, ConvLayer, Params
from peft_core.link import Link

from .conv import LoraConv
from .embedding import LoraEmbedding
from .linear import LoraLinear, add_rows

Lora = LoraLinear | LoraConv | LoraEmbedding


class Dora(Adapter):
    """Magnitudes m around the LoRA of one layer.

    Shape of m: (out,) for linear layers, (d,) for embeddings, (1, out, 1, ...) for convolutions, as in HF PEFT's files.
    """

    def __init__(self, layer: BaseLayer, lora: Lora) -> None:
        super().__init__(layer)
        self.lora = lora
        self.starts_as_base = lora.starts_as_base
        if isinstance(layer, ConvLayer):
            if layer.groups > 1:
                raise layer.refuse("use_dora needs a merged weight to take norms of, which groups > 1 have not")
            self.channels = (layer.out_features, *(1,) * len(layer.kernel_size))
            shape: tuple[int, ...] = (1, *self.channels)
        else:
            self.channels = (lora.b.shape[0],)
            shape = self.channels
        self.lora_magnitude_vector = layer.parameter(*shape)
        self._norms = _Norms()

    def reset_parameters(self) -> None:
        self.lora.reset_parameters()
        if self.lora_magnitude_vector.is_meta:  # a plan: nothing has values
            return
        weight = self.layer.params()["weight"]
        self.lora_magnitude_vector.copy_(self.norm(weight).view_as(self.lora_magnitude_vector))

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {"lora_magnitude_vector": (self, "lora_magnitude_vector"), **self.lora.slots()}

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        if slot == "lora_magnitude_vector":
            yield self, slot, value
        else:
            yield from self.lora.parts(slot, value)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state(tensors)
        self.lora.settle()

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        if other is not None and not isinstance(other, Dora):
            return dict(super().values_like(other))
        values = self.lora.values_like(None if other is None else other.lora)
        if other is None:
            norms = self.squares(self.layer.params()["weight"]).sqrt()
            values["lora_magnitude_vector"] = norms.view_as(self.lora_magnitude_vector)
        else:
            values["lora_magnitude_vector"] = other.lora_magnitude_vector
        return values

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0]
        out: Tensor = base(*args, **kwargs)
        params = self.layer.params()
        gain = self._gain(params["weight"], out)
        rest = as_compute(params["bias"], out).view(self.channels) * (1 - gain) if "bias" in params else None
        dropout = self.lora.dropout if self.training else None
        if dropout is None and not base.inner:
            moved = self.lora.add(out, x)
            # g (out - b + s B A x) + b
            return moved * gain if rest is None else torch.addcmul(rest, moved, gain)
        # The change alone, (g - 1) W x + g s B A x: of the dropped-out input (section 4.3 of the paper), or
        # on top of what other adapters make of the layer.
        if dropout is not None:
            x = dropout(x)
        through = self.layer.module(x, *args[1:], **kwargs)
        change = self.lora.add(through, x) * gain - through
        return out + (change if rest is None else change + rest)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """Linear layers: the rows' factors in two batched products, and the gain of each row's adapter."""
        x, *rest = args
        first: Dora = adapters[0]
        if first.layer.kind != "linear" or rest or kwargs or any(a.lora.dropout and a.training for a in adapters):
            return NotImplemented
        out: Tensor = base(x)
        params = first.layer.params()
        weight = params["weight"]

        def make() -> tuple[Tensor, Tensor | None]:
            gains = [adapter._gain(weight, out) for adapter in adapters]
            gain = torch.stack([*gains, torch.ones_like(gains[0])])[index].unsqueeze(1)
            return gain, as_compute(params["bias"], out) * (1 - gain) if "bias" in params else None

        owner = first.layer.module._parameters.get("weight")
        if owner is None or owner.data_ptr() != weight.data_ptr():  # a weight that is decoded at each call
            gain, rest_of_bias = make()
        else:
            tensors = [owner, *(tensor for a in adapters for tensor in (a.lora_magnitude_vector, *a.lora.own()))]
            key = base.request.rows, len(index), out.dtype
            gain, rest_of_bias = base.remembered("dora gain", key, tensors, make)
        flat = add_rows(out, x, [adapter.lora for adapter in adapters], index, base).view(len(out), -1, out.shape[-1])
        moved = flat * gain if rest_of_bias is None else torch.addcmul(rest_of_bias, flat, gain)
        return moved.view(out.shape)

    def merge(self, params: Params) -> Params:
        weight = params["weight"]
        own = self.layer.params()["weight"].to(weight.dtype)
        moved = self.lora.merge({"weight": own})["weight"]
        norm = torch.linalg.vector_norm(self._by_row(moved).flatten(1), dim=1).detach()
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)  # rows of zeros stay zeros, as in the forward
        gain = as_compute(self.lora_magnitude_vector, weight).flatten() / norm
        shape = (-1,) if isinstance(self.lora, LoraEmbedding) else (-1, *(1,) * (weight.dim() - 1))
        return {**params, "weight": weight + (moved * gain.view(shape) - own)}

    def norm(self, weight: Tensor, squares: Tensor | None = None) -> Tensor:
        """‖W + sBA‖ by row, (out,) in float32 or wider, without a graph; `squares` are ‖W‖² where they are known."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if squares is None:
                squares = self.squares(weight)
            a, b = (factor.flatten(1) for factor in self.lora.factors())
            rows = self._by_row(weight).flatten(1)
            cross = torch.mm(rows, as_compute(a, rows).t()).to(squares.dtype)
            a, b, s = a.to(squares.dtype), b.to(squares.dtype), self.lora.scaling
            rest = ((2 * s) * cross + (s * s) * (b @ (a @ a.t()))) * b
            # Rounding must not make it negative where the sum is next to nothing.
            total = squares + rest.sum(1)
            return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()

    def squares(self, weight: Tensor) -> Tensor:
        """‖W‖² by row."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(self._by_row(weight).flatten(1), dim=1, dtype=dtype)
        return norms.square()

    def _gain(self, weight: Tensor, like: Tensor) -> Tensor:
        """g = m / ‖W + sBA‖, shaped to broadcast over the layer's output; the gradient reaches m alone."""
        squares = None
        owner = self.layer.module._parameters.get("weight")
        # Inference tensors count no versions; and a graph is compiled once for all values.
        if owner is not None and not torch.compiler.is_compiling() and not owner.is_inference():
            squares = self._norms.of(owner, lambda: self.squares(weight))
        norm = self.norm(weight, squares)
        gain = self.lora_magnitude_vector.flatten() / norm.to(self.lora_magnitude_vector.dtype)
        return as_compute(gain, like).view(self.channels)

    def _by_row(self, weight: Tensor) -> Tensor:
        return weight.t() if isinstance(self.lora, LoraEmbedding) else weight


class _Norms:
    """‖W‖² of one parameter, until it is another one, or was written to."""

    def __init__(self) -> None:
        self._key: tuple[weakref.ref[nn.Parameter], int, int] | None = None
        self._value: Tensor | None = None

    def of(self, weight: nn.Parameter, compute: Any) -> Tensor:
        key = self._key
        now = (weight._version, weight.data_ptr())
        if key is None or key[0]() is not weight or key[1:] != now:
            with torch.no_grad():
                self._value = compute()
            self._key = (weakref.ref(weight), *now)
        return cast(Tensor, self._value)

    def __deepcopy__(self, memo: object) -> _Norms:
        return _Norms()

    def __reduce__(self) -> tuple[type[_Norms], tuple[()]]:
        return _Norms, ()

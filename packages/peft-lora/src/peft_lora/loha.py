"""LoHa, low-rank Hadamard products: ΔW = s (B₁ A₁) ∘ (B₂ A₂), ∘ the product element by element.

Nam Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
https://arxiv.org/abs/2108.06098, proposition 1 (the rank reaches r²), and proposition 3 for convolutions (a Tucker
form); as an adapter in https://arxiv.org/abs/2309.14859, section 3.2.

The row-wise Khatri-Rao products B = B₁ ⋆ B₂ (out, r²) and A = A₁ ⋆ A₂ (r², in), all pairs of columns (rows) multiplied,
give the same matrix as an ordinary product: (B₁A₁) ∘ (B₂A₂) = B A. So the adapter acts as two products of rank r², and
ΔW is formed only where r² is so large that this would cost more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core.adapter import as_compute
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, ConvLayer, LinearLayer

from .lycoris import Dropouts, Patterns, ProductAdapter, ProductConfig, layer_of_product
from .settings import check_file


class LoHaConfig(ProductConfig):
    """Low-rank Hadamard product, y = base(x) + s ((B₁A₁) ∘ (B₂A₂)) x with s = alpha / r.

    Args:
        r: the rank of each of the two products; that of ΔW is up to r².
        alpha: numerator of the scaling s.
        rank_dropout: probability with which, in training, an output feature of ΔW is left out of a call; the others
            are scaled up to make up for it. All rows of the batch have the same ones.
        module_dropout: probability with which, in training, the adapter of a layer is left out of a call.
        use_effective_conv2d: convolutions whose kernel is larger than one have a Tucker form, r × r × kernel and two
            factors, for either product; else a kernel is taken as a matrix (out, in ∏ kernel).
        init_weights: True (A₂ zero, all else Kaiming-uniform: the start is the base), or False (all random: the adapter
            then changes the model from the start).
        rank_pattern: exceptions from `r`, {key: rank}. A key is the path of a layer, the end of one at a dot, or a
            regular expression for it.
        alpha_pattern: exceptions from `alpha`, likewise.

    The other fields are those of `TargetedConfig`.
    """

    peft_type: ClassVar[str] = "LOHA"

    init_weights: bool = True


class LoHa(ProductAdapter):
    """B₁ `hada_w1_a` (out, r), A₁ `hada_w1_b` (r, in / groups · ∏ kernel), and B₂, A₂ (`hada_w2_a`, `hada_w2_b`) alike.

    In the Tucker form, per product: w_a (r, out), w_b (r, in / groups), and t (r, r, *kernel; with one axis, that and
    a 1), M[o, i, ...] = Σ t[p, q, ...] w_a[p, o] w_b[q, i], ΔW = s M₁ ∘ M₂.
    """

    def __init__(
        self, layer: LinearLayer | ConvLayer, r: int, scaling: float, dropouts: Dropouts, tucker: bool, init: bool
    ) -> None:
        super().__init__(layer, scaling, dropouts)
        self.starts_as_base = init
        self.tucker = tucker
        out, inner = layer.out_features, layer.in_features
        kernel: tuple[int, ...] = ()
        if isinstance(layer, ConvLayer):
            inner, kernel = inner // layer.groups, layer.kernel_size
        columns = inner if tucker else inner * math.prod(kernel)
        for number in (1, 2):
            self.register_parameter(f"hada_w{number}_a", layer.parameter(*((r, out) if tucker else (out, r))))
            self.register_parameter(f"hada_w{number}_b", layer.parameter(r, columns))
            if tucker:
                axes = kernel if len(kernel) > 1 else (*kernel, 1)
                self.register_parameter(f"hada_t{number}", layer.parameter(r, r, *axes))
        self.shape = (out, inner, *kernel)
        # One product with ΔW against two with its factors; in training, forward and backward scale alike.
        grouped = isinstance(layer, ConvLayer) and layer.groups > 1
        self.factored = not tucker and not grouped and r * r * (out + columns) <= out * columns

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if self.starts_as_base:
            nn.init.zeros_(self.hada_w2_b)  # type: ignore[arg-type]

    def weight_delta(self) -> Tensor:
        (b1, a1), (b2, a2) = self._factors()
        if self.tucker:
            t1, t2 = self.get_parameter("hada_t1"), self.get_parameter("hada_t2")
            first, second = (torch.einsum("pq...,po,qi->oi...", t, b, a) for t, b, a in ((t1, b1, a1), (t2, b2, a2)))
        else:
            first, second = b1 @ a1, b2 @ a2
        return (first * second * self.scaling).view(self.shape)

    def add_rows(self, out: Tensor, x: Tensor) -> Tensor | None:
        if not self.factored:
            return None
        (b1, a1), (b2, a2) = self._factors()
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler chooses itself what it keeps
            return torch.addmm(
                out, as_compute(x, out) @ _rows(a1, a2).to(out.dtype).t(), _columns(b1, b2).to(out.dtype).t(),
                alpha=self.scaling,
            )  # fmt: skip
        result: Tensor = _AddHadamard.apply(out, x, b1, a1, b2, a2, self.scaling)  # type: ignore[no-untyped-call]
        return result

    def convolved(self, x: Tensor) -> Tensor | None:
        if not self.factored:
            return None
        assert isinstance(self.layer, ConvLayer)
        (b1, a1), (b2, a2) = self._factors()
        a = as_compute(_rows(a1, a2), x)
        hidden = self.layer.convolve(x, a.view(-1, *self.shape[1:]))
        b = as_compute(_columns(b1, b2), hidden) * self.scaling
        b = b.view(*b.shape, *(1,) * (len(self.shape) - 2))
        result: Tensor = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.shape) - 3](hidden, b)
        return result

    def _factors(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        p: Any = self._parameters
        return (p["hada_w1_a"], p["hada_w1_b"]), (p["hada_w2_a"], p["hada_w2_b"])


def _rows(first: Tensor, second: Tensor) -> Tensor:
    """(r, n) and (r, n) -> (r², n): all pairs of rows, multiplied."""
    return (first[:, None] * second[None]).flatten(0, 1)


def _columns(first: Tensor, second: Tensor) -> Tensor:
    """(n, r) and (n, r) -> (n, r²): all pairs of columns, multiplied."""
    return (first[:, :, None] * second[:, None, :]).flatten(1)


class _AddHadamard(torch.autograd.Function):
    """out + s x ((B₁A₁) ∘ (B₂A₂))ᵀ for rows x (n, in), in the dtype of `out`. Kept for backward: x, factors, (n, r²).

    Second derivatives are refused.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scaling: float
    ) -> Tensor:
        dtype = out.dtype
        hidden = x.to(dtype) @ _rows(a1, a2).to(dtype).t()
        ctx.save_for_backward(x, b1, a1, b2, a2, hidden)
        ctx.scaling = scaling
        return torch.addmm(out, hidden, _columns(b1, b2).to(dtype).t(), alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b1, a1, b2, a2, hidden = ctx.saved_tensors
        dtype, r = grad.dtype, a1.shape[0]
        d_hidden = grad @ (_columns(b1, b2) * ctx.scaling).to(dtype)
        d_x = (d_hidden @ _rows(a1, a2).to(dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        d_a = (d_hidden.t() @ x.to(dtype)).to(a1.dtype).view(r, r, -1)
        d_b = ((grad.t() @ hidden) * ctx.scaling).to(b1.dtype).view(-1, r, r)
        return (
            grad,
            d_x,
            (d_b * b2[:, None, :]).sum(2),
            (d_a * a2[None]).sum(1),
            (d_b * b1[:, :, None]).sum(1),
            (d_a * a1[:, None]).sum(0),
            None,
        )


@hookimpl
def peft_config() -> type[LoHaConfig]:
    return LoHaConfig


@hookimpl
def peft_prepare(config: LoHaConfig, layers: Sequence[BaseLayer], shared: nn.Module, trusted: bool) -> None:
    shared.__dict__["patterns"] = Patterns(config, layers, trusted)


@hookimpl
def peft_build(config: LoHaConfig, layer: BaseLayer, shared: nn.Module, tensors: Mapping[str, Tensor] | None) -> LoHa:
    product = layer_of_product(layer, "LoHa")
    r, scaling = shared.__dict__["patterns"].rank_and_scale(layer.path)
    check_file(layer, tensors, "hada_w1_b", r)
    tucker = config.use_effective_conv2d and isinstance(product, ConvLayer) and math.prod(product.kernel_size) > 1
    dropouts = Dropouts(config.rank_dropout, config.module_dropout)
    return LoHa(product, r, scaling, dropouts, tucker, config.init_weights)


__all__ = ["LoHa", "LoHaConfig"]

"""LoKr, low-rank Kronecker products: ΔW = s C ⊗ D with C (u, v), D (k, n), u·k = out, v·n = in, and D = B A if that
is smaller.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", https://arxiv.org/abs/2212.10650; with
D low-rank in Yeh et al. 2023, https://arxiv.org/abs/2309.14859, section 3.3.

With x as a matrix X (v, n), (C ⊗ D) x is C X Dᵀ as a vector: the factors act one after the other on reshaped
activations, at about a fraction 1/u of what a product with ΔW costs, and ΔW is not formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from peft_core.adapter import as_compute
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, ConvLayer, LinearLayer

from .lycoris import Dropouts, Patterns, ProductAdapter, ProductConfig, layer_of_product
from .settings import check_file


class LoKrConfig(ProductConfig):
    """Low-rank Kronecker product, y = base(x) + s (C ⊗ D) x with s = alpha / r.

    Sizes: out = u·k and in = v·n with u ≤ k and v ≤ n, as near to square as possible.

    Args:
        r: the rank of those factors that are products themselves. D (k, n) is B A with B (k, r) and A (r, n) where
            r < max(k, n) / 2, and one matrix else.
        alpha: numerator of the scaling s.
        rank_dropout: probability with which, in training, an output feature of ΔW is left out of a call. All rows of
            the batch have the same ones.
        module_dropout: probability with which, in training, the adapter of a layer is left out of a call.
        use_effective_conv2d: a low-rank D of a convolution whose kernel is larger than one has a Tucker form,
            r × r × kernel and two factors; else B (k, r) and A (r, n ∏ kernel).
        decompose_both: C (u, v) is a product of rank r as well, where r < max(u, v) / 2.
        decompose_factor: u and v themselves where they divide, and else the limit for them; -1 for no limit.
        rank_dropout_scale: features that `rank_dropout` leaves in are scaled up to make up for the others.
        init_weights: True (C zero, all else Kaiming-uniform: the start is the base), "lycoris" (D zero instead), or
            False (all random: the adapter then changes the model from the start). Of a product, the left factor of C
            and the right one of D are the zeros.
        rank_pattern: exceptions from `r`, {key: rank}. A key is the path of a layer, the end of one at a dot, or a
            regular expression for it.
        alpha_pattern: exceptions from `alpha`, likewise.

    The other fields are those of `TargetedConfig`.
    """

    peft_type: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    @field_validator("decompose_factor")
    @classmethod
    def _factor(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("a positive integer, or -1 for factors as near to square as possible")
        return value

    @model_validator(mode="after")
    def _scale_of_nothing(self) -> LoKrConfig:
        if self.rank_dropout_scale and not self.rank_dropout:
            raise ValueError("rank_dropout_scale=True scales what rank_dropout leaves in, and rank_dropout is 0")
        return self

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        # Harmless in a file of another writer: there is nothing to scale.
        return {**data, "rank_dropout_scale": False} if not data.get("rank_dropout") else data


def factors_of(size: int, limit: int = -1) -> tuple[int, int]:
    """(a, b) with a·b = size: (limit, size / limit) where that is whole, else a ≤ b nearest to square, a ≤ limit."""
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    most = math.isqrt(size) if limit < 0 else min(limit, math.isqrt(size))
    a = next(a for a in range(most, 0, -1) if size % a == 0)
    return a, size // a


class LoKr(ProductAdapter):
    """C is `lokr_w1` (u, v), or `lokr_w1_a` (u, r) times `lokr_w1_b` (r, v).

    D is `lokr_w2` (k, n, *kernel), or `lokr_w2_a` (k, r) times `lokr_w2_b` (r, n ∏ kernel), or in the Tucker form
    Σ t[p, q, ...] w2_a[p, k] w2_b[q, n] of `lokr_w2_a` (r, k), `lokr_w2_b` (r, n), `lokr_t2` (r, r, *kernel; with one
    axis, that and a 1).
    """

    def __init__(
        self,
        layer: LinearLayer | ConvLayer,
        config: LoKrConfig,
        r: int,
        scaling: float,
        found: Mapping[str, Tensor] | None,
    ) -> None:
        dropouts = Dropouts(config.rank_dropout, config.module_dropout, scaled=config.rank_dropout_scale)
        super().__init__(layer, scaling, dropouts)
        self.init = config.init_weights
        self.starts_as_base = self.init is not False
        inner = layer.in_features
        kernel: tuple[int, ...] = ()
        if isinstance(layer, ConvLayer):
            inner, kernel = inner // layer.groups, layer.kernel_size
        self.shape = (layer.out_features, inner, *kernel)
        u, k = factors_of(layer.out_features, config.decompose_factor)
        v, n = factors_of(inner, config.decompose_factor)
        self.sizes = u, v, k, n
        self.kernel = kernel
        # Which factors are whole is read off a file's keys: writers differ in when they split one.
        whole = not (config.decompose_both and r < max(u, v) / 2) if found is None else "lokr_w1" in found
        if whole:
            self.lokr_w1 = layer.parameter(u, v)
        else:
            self.lokr_w1_a, self.lokr_w1_b = layer.parameter(u, r), layer.parameter(r, v)
        whole = r >= max(k, n) / 2 if found is None else "lokr_w2" in found
        tucker = config.use_effective_conv2d and math.prod(kernel) > 1 if found is None else "lokr_t2" in found
        if whole:
            self.lokr_w2 = layer.parameter(k, n, *kernel)
        elif tucker:
            self.lokr_w2_a, self.lokr_w2_b = layer.parameter(r, k), layer.parameter(r, n)
            self.lokr_t2 = layer.parameter(r, r, *(kernel if len(kernel) > 1 else (*kernel, 1)))
        else:
            self.lokr_w2_a, self.lokr_w2_b = layer.parameter(k, r), layer.parameter(r, n * math.prod(kernel))
        # A whole D of a one-axis kernel is not laid out as the formula says: see `weight_delta`.
        self.as_matrix = isinstance(layer, ConvLayer) and whole and len(kernel) == 1
        self.separable = not isinstance(layer, ConvLayer) or (layer.groups == 1 and not self.as_matrix)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        names = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[self.init]
        for name in names:
            if name in self._parameters:
                nn.init.zeros_(self.get_parameter(name))

    def weight_delta(self) -> Tensor:
        c, d = self._c(), self._d()
        if self.as_matrix:
            # Files are read by this rule: HF PEFT's kron sets C against the last two axes of D (k, n, kernel), so the
            # product is (k, u n, v kernel), taken as (out, in, kernel) in the order in which it lies.
            delta = torch.kron(c, d)
        else:
            delta = torch.einsum("uv,kn...->ukvn...", c, d)
        return (delta * self.scaling).reshape(self.shape)

    def add_rows(self, out: Tensor, x: Tensor) -> Tensor | None:
        b, a = self._split_d()
        c = self._c()
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler chooses itself what it keeps
            dtype = out.dtype
            return _add(out, x.to(dtype), c.to(dtype), b.to(dtype), None if a is None else a.to(dtype), self.scaling)
        result: Tensor = _AddKronecker.apply(out, x, c, b, a, self.scaling)  # type: ignore[no-untyped-call]
        return result

    def convolved(self, x: Tensor) -> Tensor | None:
        if not self.separable:
            return None
        assert isinstance(self.layer, ConvLayer)
        u, v, k, n = self.sizes
        channel = x.dim() - len(self.kernel) - 1
        hidden = x.reshape(*x.shape[:channel], v, n, *x.shape[channel + 1 :]).flatten(0, channel)  # (batch v, n, ...)
        hidden = self.layer.convolve(hidden, as_compute(self._d(), x))
        c = as_compute(self._c(), hidden) * self.scaling
        mixed = torch.einsum("uv,bv...->bu...", c, hidden.view(-1, v, *hidden.shape[1:]))  # (batch, u, k, ...)
        return mixed.reshape(*x.shape[:channel], u * k, *mixed.shape[3:])

    def _c(self) -> Tensor:
        p: Any = self._parameters
        c: Tensor = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        return c

    def _d(self) -> Tensor:
        p: Any = self._parameters
        _, _, k, n = self.sizes
        if "lokr_t2" in p:
            return torch.einsum("pq...,pk,qn->kn...", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"]).view(
                k, n, *self.kernel
            )
        b, a = self._split_d()
        return b if a is None else (b @ a).view(k, n, *self.kernel)

    def _split_d(self) -> tuple[Tensor, Tensor | None]:
        p: Any = self._parameters
        return (p["lokr_w2"], None) if "lokr_w2" in p else (p["lokr_w2_a"], p["lokr_w2_b"])


def _first(x: Tensor, a: Tensor | None, v: int) -> Tensor:
    """A at each of the v parts of the rows of x (rows, v n), A perhaps the identity: (v, rows j)."""
    rows = x.shape[0]
    inputs = x.reshape(rows * v, x.shape[1] // v)
    hidden = inputs if a is None else inputs @ a.t()
    return hidden.view(rows, v, hidden.shape[1]).transpose(0, 1).reshape(v, rows * hidden.shape[1])


def _across(c: Tensor, turned: Tensor, rows: int) -> Tensor:
    """(u, v) times (v, rows j), turned back: (rows u, j)."""
    u, j = c.shape[0], turned.shape[1] // rows if rows else 0
    return (c @ turned).view(u, rows, j).transpose(0, 1).reshape(rows * u, j)


def _last(out: Tensor, mixed: Tensor, b: Tensor, scaling: float) -> Tensor:
    """out (rows, u k) + s (B at each of the u parts)."""
    return torch.addmm(out.reshape(-1, b.shape[0]), mixed.view(-1, b.shape[1]), b.t(), alpha=scaling).view(out.shape)


def _add(out: Tensor, x: Tensor, c: Tensor, b: Tensor, a: Tensor | None, scaling: float) -> Tensor:
    """out + s (C ⊗ B A) x for rows of x (rows, v n), A perhaps the identity."""
    return _last(out, _across(c, _first(x, a, c.shape[1]), x.shape[0]), b, scaling)


class _AddKronecker(torch.autograd.Function):
    """out + s (C ⊗ B A) x for rows x (rows, v n), in the dtype of `out`.

    Kept for backward: x, the factors, and between A and C (v, rows r), which is smaller than x by n / r; where there is
    no A, x alone. Second derivatives are refused.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, c: Tensor, b: Tensor, a: Tensor | None, scaling: float) -> Tensor:
        dtype = out.dtype
        turned = _first(x.to(dtype), None if a is None else a.to(dtype), c.shape[1])
        ctx.save_for_backward(x, c, b, a, None if a is None else turned)
        ctx.scaling = scaling
        return _last(out, _across(c.to(dtype), turned, x.shape[0]), b.to(dtype), scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, c, b, a, turned = ctx.saved_tensors
        dtype, rows, (u, v), (k, j) = grad.dtype, x.shape[0], c.shape, b.shape
        inputs, c_, b_ = x.to(dtype), c.to(dtype), b.to(dtype) * ctx.scaling
        if turned is None:
            turned = _first(inputs, None, v)
        parts = grad.reshape(rows * u, k)
        d_b = (parts.t() @ _across(c_, turned, rows)) * ctx.scaling
        d_mixed = (parts @ b_).view(rows, u, j).transpose(0, 1).reshape(u, rows * j)
        d_c = d_mixed @ turned.t()
        d_a = d_x = None
        if a is not None or ctx.needs_input_grad[1]:
            d_hidden = _across(c_.t(), d_mixed, rows)
            if a is not None:
                d_a = (d_hidden.t() @ inputs.reshape(rows * v, x.shape[1] // v)).to(a.dtype)
            if ctx.needs_input_grad[1]:
                d_x = (d_hidden if a is None else d_hidden @ a.to(dtype)).view(x.shape).to(x.dtype)
        return grad, d_x, d_c.to(c.dtype), d_b.to(b.dtype), d_a, None


@hookimpl
def peft_config() -> type[LoKrConfig]:
    return LoKrConfig


@hookimpl
def peft_prepare(config: LoKrConfig, layers: Sequence[BaseLayer], shared: nn.Module, trusted: bool) -> None:
    shared.__dict__["patterns"] = Patterns(config, layers, trusted)


@hookimpl
def peft_build(config: LoKrConfig, layer: BaseLayer, shared: nn.Module, tensors: Mapping[str, Tensor] | None) -> LoKr:
    product = layer_of_product(layer, "LoKr")
    r, scaling = shared.__dict__["patterns"].rank_and_scale(layer.path)
    for slot in ("lokr_w1_b", "lokr_w2_b"):
        check_file(layer, tensors, slot, r)
    return LoKr(product, config, r, scaling, tensors)


__all__ = ["LoKr", "LoKrConfig"]

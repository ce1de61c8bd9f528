"""A scale of a layer's outputs, with few large temporaries: fresh pages cost more time than the sums do."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def scaled(out: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """gain ∘ (out - bias) + bias; `gain` and `bias` are broadcast to the shape of `out`."""
    inner = out if bias is None else out - bias
    if torch.compiler.is_compiling():  # a compiler plans its own memory
        return _plain(inner, gain, bias)
    result: Tensor = _Scaled.apply(inner, gain, bias)  # type: ignore[no-untyped-call]
    return result


def _plain(inner: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return inner * gain if bias is None else torch.addcmul(bias, inner, gain)


class _Scaled(torch.autograd.Function):
    """As `_plain`; backward has one temporary of the size of `inner`, and it is the result."""

    @staticmethod
    def forward(inner: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return _plain(inner, gain, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        inner, gain, bias = inputs
        ctx.save_for_backward(inner if ctx.needs_input_grad[1] else None, gain)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inner, gain = ctx.saved_tensors
        to_inner, to_gain, to_bias = ctx.needs_input_grad
        memory = found = None
        if to_gain:
            memory = grad * inner
            found = memory.sum_to_size(gain.shape)
        if torch.is_grad_enabled():  # a backward that is differentiated itself
            memory = None
        return (
            torch.mul(grad, gain, out=memory) if to_inner else None,
            found,
            grad.sum_to_size(ctx.bias_shape) if to_bias else None,
        )


# torch asks for it at every call, and finding it out takes longer than the scale of a small tensor.
_Scaled.forward.__signature__ = inspect.signature(_Scaled.forward)  # type: ignore[attr-defined]

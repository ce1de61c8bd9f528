"""A weight plus a low-rank part, as an object that computes like the sum without forming it.

It stands in for a parameter inside a module's forward. Products with it, and picking matrices out of a stack
of them, keep the two apart; any other use forms the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core.adapter import as_compute

Product = Callable[..., Tensor]


class Factored:
    """W + s U D. W is (o, i) or a stack (e, o, i); U (o, r) and D (r, i), stacked likewise."""

    def __init__(self, weight: Any, up: Tensor, down: Tensor, scaling: float) -> None:
        self.weight = weight  # a tensor, or another of these
        self.up = up
        self.down = down
        self.scaling = scaling
        self._split: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    # -- what a tensor says about itself -------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return self.weight.ndim  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.weight.device  # type: ignore[no-any-return]

    def size(self, *args: Any) -> Any:
        return self.weight.size(*args)

    def dim(self) -> int:
        return self.ndim

    def data_ptr(self) -> int:
        return self.weight.data_ptr()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    # -- forming the sum -----------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """W + s U D as a tensor."""
        weight = self.weight.dense() if isinstance(self.weight, Factored) else self.weight
        add = torch.addmm if weight.dim() == 2 else torch.baddbmm
        return add(weight, as_compute(self.up, weight), as_compute(self.down, weight), alpha=self.scaling)

    # -- views ---------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        if self.ndim == 3 and _is_number(index):
            if self._split is None:
                # Once for all matrices, so that backward puts their gradients together once.
                self._split = self.up.unbind(0), self.down.unbind(0)
            at = int(index)
            return Factored(self.weight[at], self._split[0][at], self._split[1][at], self.scaling)
        if self.ndim == 3 and isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point():
            return Factored(self.weight[index], self.up[index], self.down[index], self.scaling)
        return self.dense()[index]

    def transpose(self, one: int, other: int) -> Any:
        """Swap the last two axes, or any of the sum."""
        if {one % self.ndim, other % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            weight = self.weight.transpose(-2, -1)
            return Factored(weight, self.down.transpose(-2, -1), self.up.transpose(-2, -1), self.scaling)
        return self.dense().transpose(one, other)

    def t(self) -> Any:
        return self.transpose(0, 1) if self.ndim == 2 else self.dense().t()

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        return self.transpose(0, 1) if self.ndim == 2 else self.dense().T

    # -- products ------------------------------------------------------------------------------------------------

    def __matmul__(self, x: Any) -> Tensor:
        return self.before(torch.matmul, x)

    def __rmatmul__(self, x: Any) -> Tensor:
        return self.after(torch.matmul, x)

    def after(self, product: Product, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W + s (x U) D, for a product that takes x first."""
        out = product(x, self.weight, *args, **kwargs)
        hidden = product(x, as_compute(self.up, x), *args, **kwargs) * self.scaling
        return out + as_compute(product(hidden, as_compute(self.down, hidden), *args, **kwargs), out)

    def before(self, product: Product, x: Tensor) -> Tensor:
        """W x + s U (D x)."""
        out = product(self.weight, x)
        hidden = product(as_compute(self.down, x), x) * self.scaling
        return out + as_compute(product(as_compute(self.up, hidden), hidden), out)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = str(getattr(func, "__name__", func)).rpartition(".")[2]
        handler = _HANDLERS.get(name)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*(_formed(a) for a in args), **{k: _formed(v) for k, v in kwargs.items()})


def _formed(value: Any) -> Any:
    if isinstance(value, Factored):
        return value.dense()
    if isinstance(value, (tuple, list)) and any(isinstance(item, Factored) for item in value):
        return type(value)(_formed(item) for item in value)
    return value


def _is_number(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = dict(zip(("input", "weight", "bias"), args, strict=False), **kwargs)
    x, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    if not isinstance(weight, Factored) or isinstance(x, Factored) or isinstance(bias, Factored) or weight.ndim != 2:
        return NotImplemented
    out = F.linear(x, weight.weight, bias)
    if x.dim() != 2:
        hidden = F.linear(x, as_compute(weight.down, x)) * weight.scaling
        return out + as_compute(F.linear(hidden, as_compute(weight.up, hidden)), out)
    hidden = torch.mm(x, as_compute(weight.down, x).t())
    return torch.addmm(out, as_compute(hidden, out), as_compute(weight.up, out).t(), alpha=weight.scaling)


def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    one, other = args
    if isinstance(one, Factored) and isinstance(other, Factored):
        return NotImplemented
    product = torch.bmm if str(getattr(func, "__name__", "")) == "bmm" else torch.matmul
    if isinstance(other, Factored):
        return other.after(product, one)
    return one.before(product, other)


def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].transpose(*args[1:]) if len(args) == 3 and not kwargs else NotImplemented


def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of x in groups, each group times the matrix of its own: (n, i), (e, i, o), offsets (e,)."""
    if len(args) < 2 or not isinstance(args[1], Factored) or isinstance(args[0], Factored):
        return NotImplemented
    x, weight = args[0], args[1]
    if weight.ndim != 3 or kwargs.get("bias") is not None:
        return NotImplemented
    up, down = _aligned(weight.up.to(x.dtype), weight.down.to(x.dtype))
    return Factored(weight.weight, up, down, weight.scaling).after(func, x, *args[2:], **kwargs)


def _aligned(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with a rank whose rows fill whole 16 bytes, as the grouped kernels want; zeros add nothing."""
    step = 16 // up.element_size()
    missing = -up.shape[-1] % step
    if missing:
        up, down = F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing))
    return up.contiguous(), down.contiguous()


# By name: the same product exists as a function, a method, and an operator.
_HANDLERS: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "transpose": _transpose,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
}

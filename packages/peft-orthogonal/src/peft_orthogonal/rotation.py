"""Products with orthogonal matrices that are made of small blocks: R = B_{m-1} ... B_1 B_0.

B_0 is block-diagonal with k blocks b × b. B_i, for i > 0, is the same up to the order of rows and columns: with half a
block, h = b / 2 numbers, as the unit, it mixes unit q with unit q + 2^i, within segments of 2^(i+1) units. That is a
block butterfly: B_i is the component B̃^h(d, 2^(i+1)) of Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via
Butterfly Factorization", https://arxiv.org/abs/2311.06243, equations 1 and 2 and section 4.

No B_i and no R is ever formed. An index of x is (segment, side, low, h) with 2 sides and 2^i values of `low`, so to
bring x into the order of the blocks of B_i is to exchange two axes. Consecutive factors, and blocks side by side, are
first multiplied among themselves into blocks of up to `WIDTH`: one product with wide blocks is faster than several with
narrow ones, and x is kept for backward once instead of m times.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_core.adapter import as_compute

WIDTH = 32
"""Width up to which blocks are put together; measured: narrower ones save no time."""


class Part(NamedTuple):
    """Consecutive factors in one: blocks (n / width, width, width), or with one set for each row of a batch, in front.

    The order of the blocks' columns is (segment, low, side, unit), that of x is (segment, side, low, unit).
    """

    blocks: Tensor
    sides: int
    low: int
    unit: int

    def times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x (..., n) times the factors (or their transpose). With blocks for each row, x is (rows, ..., n)."""
        blocks = self.blocks.mT if transposed else self.blocks
        shape, n = x.shape, x.shape[-1]
        if self.low > 1:
            x = _exchanged(x.reshape(-1, n), self.sides, self.low, self.unit)
        if blocks.dim() == 3:
            x = _blockwise(x, blocks)
        else:
            _, count, width, _ = blocks.shape
            positions = math.prod(shape[1:-1])
            x = x.reshape(shape[0], positions, count, width).transpose(1, 2)
            x = torch.matmul(x, as_compute(blocks, x)).transpose(1, 2)
        if self.low > 1:
            x = _exchanged(x.reshape(-1, n), self.low, self.sides, self.unit)
        return x.reshape(shape)


Rotation = tuple[Part, ...]
"""B_0 first. An empty one is the identity."""


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x R along the last axis."""
    for part in reversed(rotation):
        x = part.times(x)
    return x


def rotate_back(x: Tensor, rotation: Rotation) -> Tensor:
    """x Rᵀ along the last axis. For a weight (out, in), this is the one that gives W x what `rotate` gives x."""
    for part in rotation:
        x = part.times(x, transposed=True)
    return x


def assemble(factors: Tensor, width: int = WIDTH) -> Rotation:
    """The rotation of factors (m, k, b, b), with blocks put together up to `width`.

    For m > 1, b must be even and k divisible by 2^(m-1).
    """
    m, k, b, _ = factors.shape
    parts, level = [], 0
    while level < m:
        count = 1
        while level + count < m and b << count <= width:
            count += 1
        # Not the whole of x as one dense matrix, where it is as narrow as that.
        while count > 1 and b << (count - 1) == k * b:
            count -= 1
        blocks = _composed(factors[level : level + count], level, width)
        parts.append(Part(blocks, 2**count, 2**level, b // 2))
        level += count
    return tuple(parts)


def _composed(factors: Tensor, level: int, width: int) -> Tensor:
    """Factors (g, k, b, b), the first at `level`, multiplied, in a Part's order.

    The product has blocks of 2^(g-1) b; as many of them as fit into `width` stand side by side on the diagonal of each
    that is returned.
    """
    g, k, b, _ = factors.shape
    inside, low = 2 ** (g - 1), 2**level  # blocks of a factor within one of the product
    most = max(width // (inside * b), 1)
    side_by_side = next(c for c in _divisors_down(k // inside, most) if c == 1 or c * inside < k)
    if g == side_by_side == 1:
        return factors[0].view(-1, low, b, b).flatten(0, 1)
    wide = side_by_side * inside * b
    # A factor's blocks are in the order (segment, place within one of the product, low).
    if low > 1:
        factors = factors.view(g, -1, inside, low, b * b).transpose(2, 3)
    numbers = factors.reshape(g, k // (side_by_side * inside), -1)
    places = _places(b, g, side_by_side, factors.device).expand(numbers.shape)
    blocks = numbers.new_zeros(*numbers.shape[:2], wide * wide).scatter_(2, places, numbers)
    if g == 1:
        return blocks.view(-1, wide, wide)
    product, *others = blocks.view(g, -1, wide, wide).unbind()
    for other in others:
        product = torch.bmm(other, product)
    return product


def _places(b: int, g: int, side_by_side: int, device: torch.device) -> Tensor:
    """Where the numbers of each of g factors stand in one of the wide blocks: (g, 1, numbers), indices of it, flat."""
    make = _made_places.__wrapped__ if torch.compiler.is_compiling() else _made_places
    return make(b, g, side_by_side, device)


@functools.cache
def _made_places(b: int, g: int, side_by_side: int, device: torch.device) -> Tensor:
    unit, inside = max(b // 2, 1), 2 ** (g - 1)
    block, number = torch.arange(inside, device=device), torch.arange(b, device=device)
    wide = side_by_side * inside * b
    start = torch.arange(side_by_side, device=device).view(-1, 1, 1) * (inside * b)
    found = []
    for i in range(g):
        # Block (r, q) has the units q of side 0 and of side 1 of the segment r, which has 2 sides of 2^i units.
        first = (block >> i << (i + 1)) + (block & (2**i - 1))
        rows = start + (first.view(-1, 1) + (number // unit << i)) * unit + number % unit
        found.append((rows.unsqueeze(-1) * wide + rows.unsqueeze(-2)).flatten())
    return torch.stack(found).unsqueeze(1)


def _divisors_down(number: int, most: int) -> Iterator[int]:
    return (c for c in range(min(most, number), 0, -1) if number % c == 0)


def _exchanged(x: Tensor, first: int, second: int, unit: int) -> Tensor:
    """x (rows, (segment, first, second, unit)) as (rows, (segment, second, first, unit))."""
    rows, n = x.shape
    return x.view(rows, n // (first * second * unit), first, second, unit).transpose(2, 3).reshape(rows, n)


def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x (..., k b) times a block-diagonal matrix, blocks (k, b, b), in the dtype of x."""
    # A compiler plans its own buffers, and autocast knows torch's operations only.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return _plain(x, blocks)
    result: Tensor = _Blockwise.apply(x, blocks)  # type: ignore[no-untyped-call]
    return result


class _Blockwise(torch.autograd.Function):
    """As `_plain`, without its large temporaries, which cost more than the products do."""

    @staticmethod
    def forward(x: Tensor, blocks: Tensor) -> Tensor:
        return _product(x, blocks, x.new_empty(x.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        to_x, to_blocks = ctx.needs_input_grad
        left, right = _in_blocks(grad, blocks), _in_blocks(x, blocks)
        if torch.is_grad_enabled():  # a backward that is differentiated itself
            found = torch.bmm(right.mT, left).to(blocks.dtype) if to_blocks else None
            return _plain(grad, blocks.mT) if to_x else None, found
        # Memory for one x serves both products: fresh pages cost more time than these products do.
        memory, found = x.new_empty(x.shape), None
        if to_blocks:
            if x.device.type == "cpu" and x.dtype.itemsize < 4:  # its products in half precision are slow with strides
                left = memory.view(left.shape).copy_(left)
            found = torch.bmm(left.mT, right).mT.to(blocks.dtype)
        return _product(grad, blocks.mT, memory) if to_x else None, found


# torch asks for it at every call, and finding it out takes longer than a small product.
_Blockwise.forward.__signature__ = inspect.signature(_Blockwise.forward)  # type: ignore[attr-defined]


def _product(x: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    torch.bmm(_in_blocks(x, blocks), as_compute(blocks, x), out=_in_blocks(out, blocks))
    return out


def _plain(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.bmm(_in_blocks(x, blocks), as_compute(blocks, x)).transpose(0, 1).reshape(x.shape)


def _in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """(..., k b) -> (k, rows, b)."""
    return x.reshape(-1, blocks.shape[0], blocks.shape[1]).transpose(0, 1)

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

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        blocks = self.blocks if self.blocks.dtype == x.dtype else self.blocks.to(x.dtype)
        blocks = blocks.mT if transposed else blocks
        shape, rows = x.shape, math.prod(x.shape[:-1])
        if self.low > 1:
            x = _exchanged(x, (rows, shape[-1]), self.sides, self.low, self.unit)
        if blocks.dim() == 3:
            x = _blockwise(x.reshape(rows, shape[-1]), blocks)
        else:
            _, count, width, _ = blocks.shape
            positions = math.prod(shape[1:-1])
            x = torch.matmul(x.reshape(shape[0], positions, count, width).transpose(1, 2), blocks).transpose(1, 2)
        if self.low > 1:
            x = _exchanged(x, (rows, shape[-1]), self.low, self.sides, self.unit)
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
        blocks = _composed(factors[level : level + count], level)
        parts.append(Part(_side_by_side(blocks, width), 2**count, 2**level, b // 2))
        level += count
    return tuple(parts)


def _composed(factors: Tensor, level: int) -> Tensor:
    """Factors (g, k, b, b), the first at `level`, multiplied: (k / c, c b, c b) with c = 2^(g-1), in a Part's order."""
    g, _, b, _ = factors.shape
    low, half = 2**level, b // 2
    product = factors[0].view(-1, low, b, b)
    for i in range(1, g):
        # A factor's blocks are in the order (segment, place q within a side, low); each is of (2 sides, unit) rows and
        # columns. The product so far stands in both sides of a segment, with rows (place, unit).
        blocks = factors[i].view(-1, 2**i, low, 2, half, 2, half)
        sides = product.view(-1, 2, low, 2**i, half, half << i)
        product = torch.einsum("aqlsutv,atlqvc->alsqutc", blocks, sides)
        product = product.reshape(-1, low, b << i, b << i)
    return product.flatten(0, 1)


def _side_by_side(blocks: Tensor, width: int) -> Tensor:
    """Blocks (k, b, b) -> (k / c, c b, c b), c of them on the diagonal of each, for the largest c that fits."""
    k, b, _ = blocks.shape
    c = next(c for c in _divisors_down(k, max(width // b, 1)) if c == 1 or c < k)
    if c == 1:
        return blocks
    wide = torch.diag_embed(blocks.view(k // c, c, b, b).permute(0, 2, 3, 1), dim1=1, dim2=3)
    return wide.reshape(k // c, c * b, c * b)


def _divisors_down(number: int, most: int) -> Iterator[int]:
    return (c for c in range(min(most, number), 0, -1) if number % c == 0)


def _exchanged(x: Tensor, shape: tuple[int, int], first: int, second: int, unit: int) -> Tensor:
    """x (rows, (segment, first, second, unit)) as (rows, (segment, second, first, unit)); `shape` is (rows, n)."""
    rows, n = shape
    return x.reshape(rows, n // (first * second * unit), first, second, unit).transpose(2, 3).reshape(shape)


def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x (rows, k b) times a block-diagonal matrix, blocks (k, b, b)."""
    # A compiler plans its own buffers, and autocast knows torch's operations only.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return _plain(x, blocks)
    result: Tensor = _Blockwise.apply(x, blocks)  # type: ignore[no-untyped-call]
    return result


class _Blockwise(torch.autograd.Function):
    """As `_plain`, without its large temporaries, which cost more than the products do."""

    @staticmethod
    def forward(x: Tensor, blocks: Tensor) -> Tensor:
        return _product(x, blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        to_x = _product(grad, blocks.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        left, right = _in_blocks(x, blocks), _in_blocks(grad, blocks)
        if x.device.type == "cpu" and x.dtype.itemsize < 4:  # its products in half precision are slow with strides
            left, right = left.contiguous(), right.contiguous()
        return to_x, torch.bmm(left.mT, right)


def _product(x: Tensor, blocks: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # within a backward that is differentiated itself
        return _plain(x, blocks)
    out = x.new_empty(x.shape)
    torch.bmm(_in_blocks(x, blocks), blocks, out=_in_blocks(out, blocks))
    return out


def _plain(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.bmm(_in_blocks(x, blocks), blocks).transpose(0, 1).reshape(x.shape)


def _in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """(rows, k b) -> (k, rows, b)."""
    return x.reshape(x.shape[0], blocks.shape[0], blocks.shape[1]).transpose(0, 1)

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
from typing import NamedTuple

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
        count, width = blocks.shape[-3], blocks.shape[-1]
        shape, rows = x.shape, math.prod(x.shape[:-1])
        if self.low > 1:
            x = _exchanged(x, (rows, shape[-1]), self.sides, self.low, self.unit)
        # Blocks first: the strides stay those of x, so nothing is copied, nor kept for backward but x itself.
        if blocks.dim() == 3:
            x = torch.bmm(x.reshape(rows, count, width).transpose(0, 1), blocks).transpose(0, 1)
        else:
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
    g, k, b, _ = factors.shape
    if g == 1:
        return factors[0]
    low, width = 2**level, b << (g - 1)
    rows = torch.eye(width, device=factors.device, dtype=factors.dtype)
    rows = rows.expand(k * b // width, width, width)
    for i in reversed(range(g)):
        # The blocks of one factor are in the order (segment, higher sides, lower sides, low).
        blocks = factors[i].view(-1, 2 ** (g - 1 - i), 2**i, low, b, b).permute(0, 3, 1, 2, 4, 5)
        blocks = blocks.reshape(len(rows), -1, b, b)
        units = rows.reshape(len(rows), width, -1, 2, 2**i, b // 2).transpose(3, 4)
        units = units.reshape(len(rows), width, -1, b).transpose(1, 2) @ blocks
        units = units.transpose(1, 2).reshape(len(rows), width, -1, 2**i, 2, b // 2).transpose(3, 4)
        rows = units.reshape(len(rows), width, width)
    return rows


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

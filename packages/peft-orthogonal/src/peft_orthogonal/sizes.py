"""How large the blocks of one layer are: what the config says, what divides, and what a file holds."""

from __future__ import annotations

import math

from peft_core.errors import CheckpointMismatchError
from peft_core.layers import BaseLayer, ConvLayer, EmbeddingLayer


def rotated_size(layer: BaseLayer, method: str, embeddings: bool) -> int:
    """n, the number of features that are rotated: a layer's inputs, times the kernel's; an embedding's dimension.

    Raises `TargetError` for a layer of another kind.
    """
    if isinstance(layer, ConvLayer):
        return layer.in_features * math.prod(layer.kernel_size)
    if layer.kind == "linear":
        return layer.in_features  # type: ignore[attr-defined, no-any-return]
    if embeddings and isinstance(layer, EmbeddingLayer):
        return layer.embedding_dim
    kinds = "linear layers, convolutions and embeddings" if embeddings else "linear layers and convolutions"
    raise layer.refuse(f"{method} adapts {kinds}; exclude this one")


def block_size(
    layer: BaseLayer, n: int, size: int, number: int, names: tuple[str, str], factors: int = 1, rounded: bool = False
) -> int:
    """b of this layer, from the size of a block or from the number of blocks, whichever is not 0.

    `rounded` takes the nearest admissible size (of two, the smaller) where the one asked for is not. Raises
    `TargetError`, with what is admissible.
    """
    groups = layer.groups if isinstance(layer, ConvLayer) else 1
    sizes = admissible(n, groups, factors)
    numbers = sorted(n // b for b in sizes)
    if size in sizes:
        return size
    if number in numbers:
        return n // number
    if sizes and rounded:
        return _nearest(size, sizes) if size else n // _nearest(number, numbers)
    within = f" in each of its {groups} groups" if groups > 1 else ""
    said = f"{names[0]}={size}" if size else f"{names[1]}={number}"
    reason = f"{said} does not fit its {n // groups} inputs{within}"
    if factors > 1:
        reason += (
            f", which {factors} butterfly factors need in an even number of even blocks, 2^{factors - 1} at a time"
        )
    if not sizes:
        raise layer.refuse(f"{reason}: no block size does; exclude it" + (", or use fewer factors" * (factors > 1)))
    fitting = f"{names[0]} in {sizes}" if size else f"{names[1]} in {numbers}"
    raise layer.refuse(f"{reason}. Admissible: {fitting}. Or set round_block_size=True to take the nearest")


def admissible(n: int, groups: int = 1, factors: int = 1) -> list[int]:
    """Block sizes that fit n features in `groups` groups, ascending; 1 is none: a number cannot be rotated."""
    inner = n // groups
    step = 2 ** (factors - 1)
    return [
        b for b in range(2, inner + 1) if inner % b == 0 and (factors == 1 or (b % 2 == 0 and (inner // b) % step == 0))
    ]


def size_in_file(layer: BaseLayer, slot: str, shape: tuple[int, ...], n: int, b: int, blocks: int) -> int:
    """b, as a file's tensor has it. Raises `CheckpointMismatchError` where that does not make up the layer."""
    if b < 1 or n % b or blocks != n // b:
        raise CheckpointMismatchError(
            f"{layer.path}.{slot}: the file has shape {shape}, which are not the blocks of {n} features"
        )
    return b


def _nearest(wanted: int, among: list[int]) -> int:
    return min(among, key=lambda value: (abs(value - wanted), value))

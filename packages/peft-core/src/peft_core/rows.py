"""The rows of a batch: taking some of them from a call's arguments, and putting its outputs together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import RequestError


def pick(value: Any, size: int, dim: int, rows: Tensor) -> Any:
    """Those rows of every tensor whose batch dimension has `size` entries."""
    if isinstance(value, Tensor):
        return value.index_select(dim, rows) if value.dim() > dim and value.shape[dim] == size else value
    if isinstance(value, dict):
        return {k: pick(v, size, dim, rows) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(pick(v, size, dim, rows) for v in value)
    return value


def join(pieces: list[Any], sizes: list[int], order: Tensor, dim: int) -> Any:
    """Put the groups' outputs together in the order of the batch."""
    first = pieces[0]
    if isinstance(first, Tensor):
        for at in (dim, 0) if dim else (0,):
            if all(p.dim() > at and p.shape[at] == n for p, n in zip(pieces, sizes, strict=True)):
                return torch.cat(pieces, at).index_select(at, order)
        raise RequestError("a layer's output has no batch dimension, so one adapter per row cannot be joined")
    if isinstance(first, tuple):
        return tuple(join(list(parts), sizes, order, dim) for parts in zip(*pieces, strict=True))
    if isinstance(first, dict):  # the outputs of transformers' models among them
        return type(first)(**{name: join([p[name] for p in pieces], sizes, order, dim) for name in first})
    if first is None:
        return None
    raise RequestError(
        f"a layer returned {type(first).__name__}; one adapter per row needs tensors, or tuples or dicts of them"
    )

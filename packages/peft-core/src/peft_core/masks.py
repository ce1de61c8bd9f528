"""Attention masks of a sequence that gets more positions in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError


def is_causal(module: nn.Module) -> bool:
    """Whether a backbone's tokens see only those before them, as its first attention says (if it does not: yes)."""
    for child in module.modules():
        found = vars(child).get("is_causal")
        if isinstance(found, bool):
            return found
    return True


def has_windows(module: nn.Module) -> bool:
    """Whether some of a backbone's layers see no further back than a number of positions."""
    config: Any = getattr(module, "config", None)
    kinds = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())]
    named = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return named or any(kind not in ("full_attention", "global") for kind in kinds)


def extended(mask: Any, columns: Tensor, *, rows: bool, causal: bool, where: str) -> Any:
    """`mask` with `n` more positions in front.

    Args:
        mask: None, (batch, length), (batch, heads or 1, queries, length), or several by name. Of two dimensions:
            true or one where visible. Of more: boolean, true where visible; or added to the scores.
        columns: (batch or 1, n), true where a position in front may be seen.
        rows: whether the new positions are among the queries too. They see one another (those before them, if
            `causal`), and of the others nothing if `causal`, else what anyone sees.
        where: for the error.

    Raises `RequestError` for masks that are no tensors.
    """
    if mask is None:
        return None
    if isinstance(mask, dict):
        if windows := [name for name in mask if name != "full_attention"]:
            raise RequestError(
                f"{where}: the masks {windows} were made for the input's own positions, and the window of each would "
                "have to move with the virtual ones; pass a mask of two dimensions (batch, length)"
            )
        return {k: extended(m, columns, rows=rows, causal=causal, where=where) for k, m in mask.items()}
    if not isinstance(mask, Tensor):
        raise RequestError(
            f"{where}: a mask of type {type(mask).__name__} cannot be extended by virtual positions; pass one of two "
            "dimensions (batch, length)"
        )
    columns = columns.to(mask.device)
    if columns.shape[0] > mask.shape[0]:  # one mask for rows whose positions in front differ
        mask = mask.expand(columns.shape[0], *mask.shape[1:])
    if mask.dim() == 2:
        return torch.cat([columns.to(mask.dtype).expand(mask.shape[0], -1), mask], 1)
    n = columns.shape[-1]
    seen = columns.view(-1, *[1] * (mask.dim() - 2), n)
    wide = torch.cat([_as(seen, mask).expand(*mask.shape[:-1], n), mask], -1)
    if not rows:
        return wide
    own = torch.ones(n, n, dtype=torch.bool, device=mask.device)
    # Each sees itself, visible or not: a row of scores that sees nothing has no softmax.
    own = ((own.tril() if causal else own) & seen) | torch.eye(n, dtype=torch.bool, device=mask.device)
    left = _as(own, mask).expand(*mask.shape[:-2], n, n)
    if causal:
        right = _as(torch.zeros((), dtype=torch.bool, device=mask.device), mask).expand(
            *left.shape[:-1], mask.shape[-1]
        )
    else:
        anyone = mask.any(-2, keepdim=True) if mask.dtype == torch.bool else mask.amax(-2, keepdim=True)
        right = anyone.expand(*left.shape[:-1], mask.shape[-1])
    return torch.cat([torch.cat([left, right], -1), wide], -2)


def _as(visible: Tensor, mask: Tensor) -> Tensor:
    """A boolean mask in the form of `mask`."""
    if mask.dtype == torch.bool:
        return visible
    return additive(visible, mask.dtype) if mask.is_floating_point() else visible.to(mask.dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one to be added to the scores: 0 where visible, the smallest number elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

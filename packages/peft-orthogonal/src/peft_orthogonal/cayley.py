"""The Cayley transform: orthogonal matrices from skew-symmetric ones, exactly and as a series.

For skew-symmetric Q (Qᵀ = -Q) the matrix (I - Q)(I + Q)⁻¹ is a rotation, and every rotation without the eigenvalue -1
has this form. I + Q is always invertible: its singular values are at least 1.

The two forms here turn in opposite directions, because the files of HF PEFT do: the exact one is (I - Q)(I + Q)⁻¹, and
the series approximates (I + Q)(I - Q)⁻¹, its transpose.

Everything is computed in float32 or wider, also under autocast: what is lost here is orthogonality.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def skew_from_rows(rows: Tensor, size: int) -> Tensor:
    """(..., size (size - 1) / 2), strict upper triangles row by row -> skew-symmetric (..., size, size)."""
    make: Any = _made_upper.__wrapped__ if torch.compiler.is_compiling() else _made_upper
    places = make(size, rows.device).expand(rows.shape)
    flat = rows.new_zeros((*rows.shape[:-1], size * size)).scatter_(-1, places, rows)
    upper: Tensor = flat.view(*rows.shape[:-1], size, size)
    return upper - upper.mT


@functools.cache
def _made_upper(size: int, device: torch.device) -> Tensor:
    """Where the numbers of a strict upper triangle, row by row, stand in a square matrix: indices of it, flat."""
    first, second = torch.triu_indices(size, size, 1, device=device)
    places: Tensor = first * size + second
    return places


def cayley(skew: Tensor, factor: float = 1.0) -> Tensor:
    """(I - Q)(I + Q)⁻¹ for Q = factor · `skew`, skew-symmetric (..., size, size), computed as 2 (I + Q)⁻¹ - I."""
    skew = _wide(skew)
    with _exact(skew):
        eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
        # Unchecked, as it cannot fail: the check would make the host wait for the device.
        inverse: Tensor = torch.linalg.inv_ex(torch.add(eye, skew, alpha=factor)).inverse
        return torch.lerp(eye, inverse, 2.0)


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """The Neumann series of (I + Q)(I - Q)⁻¹, cut off: I + 2Q + 2Q² + ... + 2Qᵖ⁻¹ + Qᵖ with p = max(terms, 4) - 1.

    Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", https://arxiv.org/abs/2506.19847, section 4.2. As HF PEFT
    has it: the last term counts once, two terms are I + 2Q, one term is I, and three are four. Orthogonal up to
    ‖Q‖^(p+1) or so, hence only for small Q.
    """
    skew = _wide(skew)
    with _exact(skew):
        eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
        if terms == 1:
            return eye + 0 * skew  # still a function of Q, whose gradient is zero
        if terms == 2:
            return eye + 2 * skew
        flat, double = skew.reshape(-1, *skew.shape[-2:]), 2 * eye
        series = flat + double
        for _ in range(max(terms, 4) - 3):
            series = torch.baddbmm(double, series, flat)
        return torch.baddbmm(eye, series, flat).view(skew.shape)


def _exact(like: Tensor) -> Any:
    """No autocast, where there is any."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _wide(matrices: Tensor) -> Tensor:
    return matrices.to(torch.promote_types(matrices.dtype, torch.float32))

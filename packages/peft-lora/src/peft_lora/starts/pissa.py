"""PiSSA: A and B start as the weight's principal part.

Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
https://arxiv.org/abs/2404.02948, equations 2 and 3: with W = U S Vᵀ, A = √S[:r] V[:, :r]ᵀ and B = U[:, :r] √S[:r].
Here S is divided by the scaling s first, so that s B A is that part of W, as in HF PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import truncated


def factors(weight: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) for `weight` (out, in).

    The decomposition is exact, or a randomised one with `niter` power iterations (the paper's section 4, "fast
    SVD"), which costs little more than the products it is made of.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = truncated.randomised(weight, r, niter)
    return split(u[:, :r], s[:r], vh[:r], scaling)


def split(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with scaling · B A = u diag(s) vh, the singular values shared evenly."""
    # A negative scaling goes to one side.
    root = (s / abs(scaling)).sqrt()
    return root.unsqueeze(1) * vh, u * (root if scaling > 0 else -root)

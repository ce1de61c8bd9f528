"""The first singular directions of a large matrix, at the cost of some products with it.

Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", https://arxiv.org/abs/0909.4061, algorithm 4.4
with the orthonormalisation of section 4.5. The random directions come from a generator of its own: the same matrix
gives the same result, and the user's random numbers are not used up.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Section 4.2: a few directions more than wanted make the wanted ones sharp.
OVERSAMPLING = 10
# What the authors of LoRA-GA use, and more than section 4.5 asks for in spectra that fall slowly.
ITERATIONS = 4


def svd(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), Vᵀ (k, n) of `matrix` (m, n); exact where that is not much dearer.

    k counts no more than the smaller side.
    """
    if min(matrix.shape) <= 4 * (k + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :k], s[:k], vh[:k]
    return randomised(matrix, k, ITERATIONS)


def randomised(matrix: Tensor, k: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `svd`, by subspace iteration from random directions."""
    width = min(k + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix.t() @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ u[:, :k], s[:k], vh[:k]

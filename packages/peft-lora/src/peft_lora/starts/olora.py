"""OLoRA: A and B start as the beginning of the weight's QR decomposition.

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2406.01775, algorithm 1: with W = Q R, B = Q[:, :r] and A = R[:r].
"""

from __future__ import annotations

import torch
from torch import Tensor


def factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), its columns orthonormal, for `weight` (out, in)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]

"""Task arithmetic: one tensor made of several of the same shape.

TIES: Yadav et al. 2023, "TIES-Merging", https://arxiv.org/abs/2306.01708, section 3 (trim, elect signs, disjoint mean).
DARE: Yu et al. 2023, "Language Models are Super Mario", https://arxiv.org/abs/2311.03099, section 3.1 (drop, rescale).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from peft_core import CombineError

Sign = Literal["total", "frequency"]


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the entries that are largest in magnitude; zero elsewhere."""
    keep = int(density * tensor.numel())
    if keep >= tensor.numel():
        return tensor
    flat = tensor.flatten()
    # A threshold would keep too many where magnitudes are equal.
    kept = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability `density`, and divided by it, so that the mean stays."""
    # Drawn on the CPU: the same seed drops the same entries on every device.
    mask = torch.rand(tensor.shape, generator=generator) < density
    return tensor * mask.to(tensor.device) / density


def elected(tensors: Sequence[Tensor], weights: Sequence[float], sign: Sign) -> Tensor:
    """The mean, entry by entry, over the tensors whose sign is that of the majority; each times its weight.

    The majority goes by the sum of the entries ("total") or by their number ("frequency"); a draw counts as positive.
    """
    total: Tensor = sum(t.sign() for t in tensors) if sign == "frequency" else sum(tensors)  # type: ignore[assignment]
    majority = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    mean, count = torch.zeros_like(total), torch.zeros_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == majority
        mean = mean + weight * tensor * agrees
        count = count + agrees
    return mean / count.clamp_min(1)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · tensor."""
    total: Tensor = sum(weight * tensor for tensor, weight in zip(tensors, weights, strict=True))  # type: ignore[assignment]
    return total


class Arithmetic:
    """One of the ways to combine, with its options.

    `how` is "linear", "magnitude_prune", "ties", "dare_linear" or "dare_ties". All but "linear" need a `density` in
    (0, 1]; random ones are made again by the same `seed`. Raises `CombineError`.
    """

    def __init__(self, how: str, *, density: float | None, sign: Sign, seed: int) -> None:
        if how not in WAYS:
            raise CombineError(f"{how!r} is none of {', '.join(WAYS)}")
        if how != "linear" and (density is None or not 0 < density <= 1):
            raise CombineError(
                f"{how!r} needs density, the share of entries to keep, above 0 and up to 1; not {density!r}"
            )
        if sign not in ("total", "frequency"):
            raise CombineError(f"majority_sign_method is 'total' or 'frequency', not {sign!r}")
        self.how = how
        self.density = density or 1.0
        self.sign: Sign = sign
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Combine tensors of one shape."""
        return WAYS[self.how](self, tensors, weights)

    def _dropped(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [dropped(tensor, self.density, self.generator) for tensor in tensors]

    def _trimmed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [trimmed(tensor, self.density) for tensor in tensors]


Way = Callable[[Arithmetic, Sequence[Tensor], Sequence[float]], Tensor]
WAYS: dict[str, Way] = {
    "linear": lambda own, tensors, weights: weighted_sum(tensors, weights),
    "magnitude_prune": lambda own, tensors, weights: weighted_sum(own._trimmed(tensors), weights),
    "ties": lambda own, tensors, weights: elected(own._trimmed(tensors), weights, own.sign),
    "dare_linear": lambda own, tensors, weights: weighted_sum(own._dropped(tensors), weights),
    "dare_ties": lambda own, tensors, weights: elected(own._dropped(tensors), weights, own.sign),
}

"""MiCA: B holds the weight's minor left singular vectors and does not train; A starts at zero.

As in HF PEFT (`init_lora_weights="mica"`): B is the last r columns of U in W = U S Vᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) for `weight` (out, in)."""
    b = torch.linalg.svd(weight, full_matrices=False).U[:, -r:]
    # A singular vector's sign is the decomposition's whim; B should not depend on the machine.
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))
    return weight.new_zeros(r, weight.shape[1]), b * largest.sign()

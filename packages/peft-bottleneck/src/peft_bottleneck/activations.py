"""The nonlinearities between the two projections, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    # The approximation by a tangent, as in GPT-2.
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
    "leaky_relu": F.leaky_relu,  # slope 0.01 below zero
    "tanh": torch.tanh,
}

SPELLINGS: Mapping[str, str] = {"silu": "swish", "leakyrelu": "leaky_relu"}
"""Other names of the same functions."""

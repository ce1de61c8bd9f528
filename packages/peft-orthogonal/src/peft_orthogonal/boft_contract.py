"""BOFT keeps the contract of methods, on every kind of layer it adapts.

Read by `python -m peft_core check --contract`, and by the package's own tests.
"""

from __future__ import annotations

from peft_core.testing import CASES, MethodContract

from .boft import BOFTConfig

LAYERS = ("linear", "conv1d", "conv2d", "conv3d")
# Sizes that do not divide are rounded: the suite has layers of 3, 8, 9, 16, 24, 27, 72 ... features.


class TestBoft(MethodContract):
    config = BOFTConfig(boft_block_size=4, round_block_size=True)
    layer_kinds = LAYERS


class TestButterflies(MethodContract):
    """Three factors; groups of an odd number of inputs cannot have them."""

    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, init_weights=False, round_block_size=True)
    layer_kinds = LAYERS
    refused_cases = tuple(name for name in CASES if "groups" in name or "depthwise" in name)


class TestBoftBiases(MethodContract):
    config = BOFTConfig(boft_block_size=4, bias="boft_only", init_weights=False, round_block_size=True)
    layer_kinds = LAYERS

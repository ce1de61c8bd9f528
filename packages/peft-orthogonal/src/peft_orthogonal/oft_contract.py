"""OFT keeps the contract of methods, on every kind of layer it adapts.

Read by `python -m peft_core check --contract`, and by the package's own tests.
"""

from __future__ import annotations

from peft_core.testing import MethodContract

from .oft import OFTConfig

LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "embedding")
# Sizes that do not divide are rounded: the suite has layers of 3, 8, 9, 16, 24, 27, 72 ... features.


class TestOft(MethodContract):
    config = OFTConfig(oft_block_size=4, round_block_size=True)
    layer_kinds = LAYERS


class TestOftExact(MethodContract):
    config = OFTConfig(oft_block_size=8, use_cayley_neumann=False, init_weights=False, round_block_size=True)
    layer_kinds = LAYERS


class TestOftShared(MethodContract):
    config = OFTConfig(r=2, oft_block_size=0, block_share=True, use_cayley_neumann=False, round_block_size=True)
    layer_kinds = LAYERS


class TestConstrained(MethodContract):
    config = OFTConfig(oft_block_size=4, coft=True, eps=0.5, round_block_size=True)
    layer_kinds = LAYERS
    exact_gradients = False  # by design the way back within the bound counts as no part of the function


class TestOftBiases(MethodContract):
    config = OFTConfig(oft_block_size=4, bias="all", round_block_size=True)
    layer_kinds = LAYERS

"""OFT and BOFT keep the contract of methods, on every kind of layer they adapt."""

from __future__ import annotations

from peft_core.testing import CASES, MethodContract
from peft_orthogonal import BOFTConfig, OFTConfig

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
# Sizes that do not divide are rounded: the suite has layers of 3, 8, 9, 16, 24, 27, 72 ... features.
ANY: dict[str, bool] = {"round_block_size": True}


class TestOft(MethodContract):
    config = OFTConfig(oft_block_size=4, **ANY)
    layer_kinds = ("linear", *CONVOLUTIONS, "embedding")


class TestOftExact(MethodContract):
    config = OFTConfig(oft_block_size=8, use_cayley_neumann=False, init_weights=False, **ANY)
    layer_kinds = ("linear", *CONVOLUTIONS, "embedding")


class TestOftShared(MethodContract):
    config = OFTConfig(r=2, oft_block_size=0, block_share=True, use_cayley_neumann=False, **ANY)
    layer_kinds = ("linear", *CONVOLUTIONS, "embedding")


class TestConstrained(MethodContract):
    config = OFTConfig(oft_block_size=4, coft=True, eps=0.5, **ANY)
    layer_kinds = ("linear", *CONVOLUTIONS, "embedding")
    exact_gradients = False  # by design the way back within the bound counts as no part of the function


class TestBoft(MethodContract):
    config = BOFTConfig(boft_block_size=4, **ANY)
    layer_kinds = ("linear", *CONVOLUTIONS)


class TestButterflies(MethodContract):
    """Three factors; groups of an odd number of inputs cannot have them."""

    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, init_weights=False, **ANY)
    layer_kinds = ("linear", *CONVOLUTIONS)
    refused_cases = tuple(name for name in CASES if "groups" in name or "depthwise" in name)

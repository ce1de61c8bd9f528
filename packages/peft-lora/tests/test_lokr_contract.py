"""LoKr keeps the contract of methods, on every kind of layer it adapts."""

from __future__ import annotations

from peft_core.testing import MethodContract
from peft_lora import LoKrConfig

KINDS = ("linear", "conv1d", "conv2d", "conv3d")


class TestWhole(MethodContract):
    """Ranks so large that both factors are matrices of their own."""

    config = LoKrConfig(r=8)
    layer_kinds = KINDS


class TestLowRank(MethodContract):
    config = LoKrConfig(r=2, alpha=3, decompose_factor=2, init_weights="lycoris")
    layer_kinds = KINDS


class TestBothLowRank(MethodContract):
    config = LoKrConfig(r=1, decompose_both=True, init_weights=False)
    layer_kinds = KINDS


class TestTucker(MethodContract):
    config = LoKrConfig(r=1, use_effective_conv2d=True, decompose_factor=2)
    layer_kinds = KINDS

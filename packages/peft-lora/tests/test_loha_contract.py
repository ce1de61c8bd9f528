"""LoHa keeps the contract of methods, on every kind of layer it adapts."""

from __future__ import annotations

from peft_core.testing import MethodContract
from peft_lora import LoHaConfig

KINDS = ("linear", "conv1d", "conv2d", "conv3d")


class TestFactored(MethodContract):
    """Small enough a rank that ΔW is never formed at most layers."""

    config = LoHaConfig(r=2, alpha=5)
    layer_kinds = KINDS


class TestFormed(MethodContract):
    config = LoHaConfig(r=6, alpha=4, init_weights=False)
    layer_kinds = KINDS


class TestTucker(MethodContract):
    config = LoHaConfig(r=3, use_effective_conv2d=True)
    layer_kinds = KINDS

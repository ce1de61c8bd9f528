"""AdaLoRA keeps the contract of methods, on every kind of layer it adapts."""

from __future__ import annotations

from peft_core.testing import CASES, MethodContract
from peft_lora import AdaLoraConfig

KINDS = ("linear", "conv1d", "conv2d", "conv3d")
GROUPED = tuple(name for name in CASES if "groups" in name or "depthwise" in name)


class TestAdaLora(MethodContract):
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3)
    layer_kinds = KINDS
    refused_cases = GROUPED


class TestRandomStart(MethodContract):
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, init_lora_weights=False, orth_reg_weight=0.0)
    layer_kinds = KINDS
    refused_cases = GROUPED

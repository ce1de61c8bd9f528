"""LoRA from every start that needs no data keeps the contract of methods."""

from __future__ import annotations

from peft_core.testing import CASES, MethodContract
from peft_lora import LoraConfig

MATRICES = ("linear", "conv1d", "conv2d", "conv3d", "embedding")
# A decomposition is of one kernel.
GROUPED = tuple(name for name in CASES if "groups" in name or "depthwise" in name)


class TestPissa(MethodContract):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa")
    layer_kinds = MATRICES
    refused_cases = GROUPED


class TestPissaNiter(MethodContract):
    config = LoraConfig(r=4, use_rslora=True, init_lora_weights="pissa_niter_3")
    layer_kinds = MATRICES
    refused_cases = GROUPED


class TestOlora(MethodContract):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora")
    layer_kinds = MATRICES
    refused_cases = GROUPED


class TestMica(MethodContract):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="mica")
    layer_kinds = MATRICES
    refused_cases = GROUPED


class TestPissaDora(MethodContract):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", use_dora=True)
    layer_kinds = MATRICES
    refused_cases = GROUPED
    exact_gradients = False  # the paper holds the norm constant in the backward pass

"""LoRA and DoRA keep the contract of methods, on every kind of layer they adapt.

Read by `python -m peft_core check --contract`, and by the package's own tests.
"""

from __future__ import annotations

from typing import Any, ClassVar

from peft_core.testing import CASES, MethodContract

from .config import LoraConfig

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LINEAR = ("linear",)
# With groups the adapter reads all input channels: there is no kernel of the layer that does.
GROUPED = tuple(name for name in CASES if "groups" in name or "depthwise" in name)


class TestLora(MethodContract):
    config = LoraConfig(r=8, lora_alpha=12)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "attention", "embedding")
    refused_cases = ("attention-wide-keys",)
    unmergeable_cases = GROUPED


class TestRandomStart(MethodContract):
    config = LoraConfig(r=8, use_rslora=True, init_lora_weights=False)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "attention", "embedding")
    refused_cases = ("attention-wide-keys",)
    unmergeable_cases = GROUPED


class TestOrthogonalStart(MethodContract):
    config = LoraConfig(r=8, init_lora_weights="orthogonal")
    layer_kinds = (*LINEAR, "attention")
    refused_cases = ("attention-wide-keys",)


class TestDora(MethodContract):
    config = LoraConfig(r=4, use_dora=True)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "embedding")
    refused_cases = GROUPED
    exact_gradients = False  # the paper holds the norm constant in the backward pass


class TestActivatedLora(MethodContract):
    config = LoraConfig(r=8, alora_invocation_tokens=[2], target_modules=r".*\.(up|down|up_proj|down_proj)")
    layer_kinds = ("model",)  # what a position is, the model says
    mergeable = False

    def call_arguments(self, rows: int) -> dict[str, Any]:
        return {"alora_offsets": [row % 4 + 1 for row in range(rows)]}


class TestQaLora(MethodContract):
    config = LoraConfig(r=8, use_qalora=True, qalora_group_size=4)


class TestLoraBias(MethodContract):
    config: ClassVar[LoraConfig] = LoraConfig(r=8, lora_bias=True)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "attention")
    refused_cases = ("attention-wide-keys", "attention-no-bias")
    unmergeable_cases = (*GROUPED, *(name for name in CASES if name.endswith("no-bias")))

    def configure(self, targets: list[str]) -> LoraConfig:
        # Without the one layer of the suite's model that has no bias to merge into.
        return self.config.resolve(target_modules=[name for name in targets if not name.endswith(".down")])

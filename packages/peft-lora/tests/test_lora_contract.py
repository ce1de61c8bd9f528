"""LoRA and DoRA keep the contract of methods, on every kind of layer they adapt."""

from __future__ import annotations

from peft_core import AdapterConfig
from peft_core.testing import CASES, MethodContract
from peft_lora import LoraConfig

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LINEAR = ("linear",)
# With groups the adapter reads all input channels: there is no kernel of the layer that does.
GROUPED = tuple(name for name in CASES if "groups" in name or "depthwise" in name)


# LoRA's own modules, one for each kind of layer.
PARTS = "attention biases config conv dora embedding factored linear parameters selection settings tokens"
SIBLINGS = tuple(f"peft_lora.{name}" for name in PARTS.split())


class TestLora(MethodContract):
    config = LoraConfig(r=8, lora_alpha=12)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "attention", "embedding")
    refused_cases = ("attention-wide-keys",)
    unmergeable_cases = GROUPED
    exact_gradients = False  # the padding token's row has none, as in the embedding itself
    siblings = SIBLINGS


class TestRandomStart(MethodContract):
    config = LoraConfig(r=8, use_rslora=True, init_lora_weights=False)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "attention", "embedding")
    refused_cases = ("attention-wide-keys",)
    unmergeable_cases = GROUPED
    siblings = SIBLINGS

    def configure(self, targets: list[str]) -> AdapterConfig:
        # Without the embedding, whose padding row has no gradient: here gradients are those of the function.
        return self.config.resolve(target_modules=[t for t in targets if t != "embedding"] or targets)


class TestOrthogonalStart(MethodContract):
    config = LoraConfig(r=8, init_lora_weights="orthogonal")
    layer_kinds = (*LINEAR, "attention")
    refused_cases = ("attention-wide-keys",)
    siblings = SIBLINGS


class TestDora(MethodContract):
    config = LoraConfig(r=4, use_dora=True)
    layer_kinds = (*LINEAR, *CONVOLUTIONS, "embedding")
    refused_cases = GROUPED
    exact_gradients = False  # the paper holds the norm constant in the backward pass
    siblings = SIBLINGS

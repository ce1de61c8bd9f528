"""X-LoRA keeps the contract of methods, over experts of LoRA that every check finds on its model.

Read by `python -m peft_core check --contract`, and by the package's own tests. Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_core.testing import MethodContract
from peft_core.testing.models import seeded

from .config import LoraConfig
from .xlora import XLoraConfig

EXPERTS = {
    # In a GPT-NeoX, and in a Llama.
    "first": LoraConfig(r=4, target_modules=r".*(query_key_value|dense_h_to_4h|q_proj|down_proj)"),
    "second": LoraConfig(r=2, target_modules=r".*(query_key_value|q_proj)"),
    "third": LoraConfig(r=3, target_modules=r".*(dense|v_proj)"),
}


class XLoraContract(MethodContract):
    layer_kinds = ("model",)
    mergeable = False

    def base(self, dtype: torch.dtype = torch.float64) -> Any:
        from peft_core.testing.decoder import Decoder

        return seeded(Decoder, dtype)

    def prepare(self, model: nn.Module, targets: list[str]) -> None:
        for name, config in EXPERTS.items():
            self.put(model, name, config)


class TestXLora(XLoraContract):
    config = XLoraConfig(adapters=tuple(EXPERTS), xlora_depth=1, xlora_dropout_p=0.0)


class TestLayerwise(XLoraContract):
    config = XLoraConfig(
        adapters=tuple(EXPERTS),
        layerwise_scalings=True,
        xlora_depth=2,
        xlora_size=8,
        xlora_dropout_p=0.0,
        enable_softmax=False,
        enable_softmax_topk=True,
        top_k_lora=2,
        global_scaling_weight=0.5,
    )


class TestTrainedExperts(XLoraContract):
    config = XLoraConfig(adapters=tuple(EXPERTS), xlora_depth=1, xlora_dropout_p=0.0, use_trainable_adapters=True)

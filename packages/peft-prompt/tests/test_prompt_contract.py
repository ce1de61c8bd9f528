"""The prompt methods keep the contract of methods, on a GPT-NeoX in the place of the suite's own model.

Of the decoders it is one that computes in float64 throughout: others round to float32 inside their norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from peft_core.testing import MethodContract
from peft_core.testing.models import VOCABULARY, seeded
from peft_prompt import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)


class Net(GPTNeoXForCausalLM):
    """A GPT-NeoX with the names and the outputs of the suite's model: token ids -> scores."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
        others = {"num_attention_heads": 2, "initializer_range": 0.5, "pad_token_id": 0}
        super().__init__(GPTNeoXConfig(vocab_size=VOCABULARY, **sizes, **others))
        self.head = self.lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        return self.gpt_neox.layers

    @property
    def checkpointing(self) -> str | None:
        return None

    @checkpointing.setter
    def checkpointing(self, kind: str | None) -> None:
        self.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})

    def forward(self, ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(ids, use_cache=False, **kwargs).logits


class OnADecoder(MethodContract):
    __test__ = False
    layer_kinds = ("model",)
    mergeable = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = True

    def base(self, dtype: torch.dtype = torch.float64) -> Any:
        return seeded(Net, dtype)


class TestPromptTuning(OnADecoder):
    config = PromptTuningConfig(num_virtual_tokens=3)


class TestPTuning(OnADecoder):
    config = PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8)


class TestPTuningLSTM(OnADecoder):
    config = PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=4, encoder_reparameterization_type="LSTM")


class TestPrefixTuning(OnADecoder):
    config = PrefixTuningConfig(num_virtual_tokens=3)


class TestProjectedPrefixes(OnADecoder):
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6)


class TestMultitask(OnADecoder):
    config = MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, num_ranks=2)

    def call_arguments(self, rows: int) -> dict[str, Any]:
        return {"task_ids": torch.arange(rows) % 2}


class TestAdaptionPrompt(OnADecoder):
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)

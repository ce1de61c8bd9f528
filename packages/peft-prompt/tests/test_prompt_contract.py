"""The prompt methods keep the contract of methods, on a decoder in the place of the suite's own model."""

from __future__ import annotations

from typing import Any

import torch

from peft_core.testing import MethodContract
from peft_core.testing.decoder import Decoder
from peft_core.testing.models import seeded
from peft_prompt import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)


class OnADecoder(MethodContract):
    __test__ = False
    layer_kinds = ("model",)
    mergeable = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = True

    def base(self, dtype: torch.dtype = torch.float64) -> Any:
        return seeded(Decoder, dtype)


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

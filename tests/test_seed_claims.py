"""The counts and sizes with which PEFT was announced, on the meta device and with the targets one gets by default.

https://huggingface.co/blog/peft: "trainable params: 2359296 || all params: 1231940608 || trainable%:
0.19151053100118282" for mt0-large, and an adapter of 19 MB for T0_3B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from peft_core import get_peft_model, load_method, plan

SHAPES: dict[str, Any] = {
    "mt0-large": transformers.MT5Config(
        vocab_size=250112,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
    ),
    # t5-3b in its version 1.1 (gated, head untied), which T0 was trained from.
    "T0_3B": transformers.T5Config(
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
    ),
}
CLASSES = {
    "mt0-large": transformers.MT5ForConditionalGeneration,
    "T0_3B": transformers.T5ForConditionalGeneration,
}


def base(name: str) -> Any:
    with torch.device("meta"):
        model = CLASSES[name](SHAPES[name])
        # The published weights have heads of their own. transformers 5 ties them, whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def config() -> Any:
    return load_method("lora")(r=8, lora_alpha=32, lora_dropout=0.1, task_type="SEQ_2_SEQ_LM")


def test_mt0_large(capsys: pytest.CaptureFixture[str]) -> None:
    model = base("mt0-large")
    shown = plan(model, config())
    assert (shown.trainable, shown.base + shown.trainable) == (2359296, 1231940608)
    get_peft_model(model, config())
    assert model.get_nb_trainable_parameters() == (2359296, 1231940608)
    assert str(100 * 2359296 / 1231940608) == "0.19151053100118282"
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915\n"
    )
    assert all(parameter.is_meta for parameter in model.parameters())


def test_t0_3b(tmp_path: Path) -> None:
    model = get_peft_model(base("T0_3B"), config())
    assert model.get_nb_trainable_parameters()[0] == 4718592
    for site in model._peft.sites.values():
        site.adapters.to_empty(device="cpu")  # the adapter alone: the base stays without data
        for parameter in site.adapters.parameters():
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        assert len(opened.keys()) == 288
        assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {"F32"}  # noqa: SIM118
    # 18.9 MB of numbers; names, shapes, offsets and the config before them take less than 64 kB.
    assert 4 * 4718592 < file.stat().st_size < 4 * 4718592 + 65536
    assert round(file.stat().st_size / 1e6) == 19

"""`AutoPeftModel` and its kin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import peft_core
from peft_core import AutoPeftModel, AutoPeftModelForCausalLM, CheckpointError, PeftModel, get_peft_model
from tests.tiny_transformers import batch, lora, make, randomise, scores

CLASSES = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "llama"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", "t5"),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "bert"),
}
OTHERS = {
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", transformers.BertForTokenClassification),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", transformers.BertForQuestionAnswering),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", transformers.BertModel),
}


def saved(folder: Path, kind: str, base: Any = None, **fields: Any) -> Any:
    """An adapted model, its adapter in `folder`, its base beside it."""
    base = base or make(kind)
    base.save_pretrained(folder / "base")
    model = get_peft_model(type(base).from_pretrained(folder / "base"), lora(kind, **fields))
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("task", CLASSES)
def test_the_class_of_the_task(task: str, tmp_path: Path) -> None:
    name, kind = CLASSES[task]
    model = saved(tmp_path, kind, task_type=task)
    for cls in (getattr(peft_core, name), AutoPeftModel):
        loaded = cls.from_pretrained(tmp_path / "adapter")
        assert isinstance(loaded, PeftModel) and isinstance(loaded, type(make(kind))) and not loaded.training
        assert torch.equal(scores(loaded, batch(kind)), scores(model, batch(kind)))


@pytest.mark.parametrize("task", OTHERS)
def test_the_class_of_other_tasks(task: str, tmp_path: Path) -> None:
    name, cls = OTHERS[task]
    saved(tmp_path, "bert", cls(make("bert").config), task_type=task)
    assert isinstance(getattr(peft_core, name).from_pretrained(tmp_path / "adapter"), cls)


def test_without_a_task_it_is_the_class_of_the_base(tmp_path: Path) -> None:
    model = saved(tmp_path, "gpt2")
    for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "adapter", adapter_name="a", is_trainable=True)
        assert loaded.active_adapter == "a" and any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(scores(loaded.eval(), batch("gpt2")), scores(model, batch("gpt2")))


@pytest.mark.filterwarnings("ignore")  # the other library's
def test_hf_peft_finds_the_class_too(tmp_path: Path) -> None:
    hf = pytest.importorskip("peft")
    model = saved(tmp_path, "gpt2")
    theirs = hf.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(scores(theirs, batch("gpt2")), scores(model, batch("gpt2")))


def test_the_embedding_grows_to_the_tokenizer(tmp_path: Path) -> None:
    saved(tmp_path, "llama", task_type="CAUSAL_LM")
    words = Tokenizer(WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    weight = loaded.get_input_embeddings().weight
    assert (weight.shape[0], weight.dtype) == (40, torch.bfloat16)


def test_what_cannot_be_known_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_peft_model(make("llama"), lora("llama")).save_pretrained(tmp_path / "no base")
    with pytest.raises(CheckpointError, match="names no base model; load the base yourself"):
        AutoPeftModel.from_pretrained(tmp_path / "no base")
    saved(tmp_path, "llama", task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match="the adapter's task is CAUSAL_LM, not SEQ_CLS"):
        peft_core.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    saved(tmp_path, "llama")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    config.architectures = ["Trainer"]  # of transformers, and no model
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="says which class to load"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")

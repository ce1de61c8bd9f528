"""`select` chooses the modules that Hugging Face PEFT adapts, for the same fields and the same model."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraModel
from torch import nn

from peft_core.config import TargetedConfig
from peft_core.targets import select


class Config(TargetedConfig):
    """Any method's selection fields; its default roles are those of the oracle's method."""

    peft_type: ClassVar[str] = "PARITY"
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def t5() -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def opt() -> nn.Module:
    sizes = SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


def bloom() -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "n_layer": 3, "n_head": 2}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))


CASES: list[tuple[Any, dict[str, Any]]] = [
    *[(model, {}) for model in (llama, gpt2, bert, t5, opt, neox, bloom)],
    *[(model, {"target_modules": "all-linear"}) for model in (llama, gpt2, t5, opt, neox, bloom)],
    (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
    (bert, {"target_modules": ["output.dense", "classifier"]}),
    (bert, {"target_modules": ["attention.output.dense"], "layers_to_transform": 1}),
    (llama, {"target_modules": ["q_proj", "mlp.down_proj"]}),
    (llama, {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    (llama, {"target_modules": r".*layers\.[02].*\.(q|k)_proj"}),
    (llama, {"target_modules": "ALL-Linear", "exclude_modules": ["o_proj", "2.mlp.up_proj"]}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    (llama, {"target_modules": ["lm_head", "embed_tokens"]}),
    (llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    (gpt2, {"target_modules": ["c_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}),
    (t5, {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": ["block"]}),
    (t5, {"target_modules": ["q", "wo"], "layers_to_transform": [1]}),
]


def hf_chooses(model: nn.Module, fields: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF PEFT warns about how it treats Conv1D and tied embeddings.
        return sorted(LoraModel(model, peft.LoraConfig(**fields), "default", True).targeted_module_names)


@pytest.mark.parametrize(("build", "fields"), CASES, ids=[f"{m.__name__}-{i}" for i, (m, _) in enumerate(CASES)])
def test_same_modules_as_hf(build: Any, fields: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, theirs = build(), build()
    theirs_chosen = hf_chooses(theirs, fields)
    # HF takes names that match nothing in silence, so those cases are read as if from a file.
    selection = select(ours, Config(**fields), trusted=False)
    assert not selection.problems
    assert sorted(selection.matched) == theirs_chosen


@pytest.mark.parametrize("build", [llama, gpt2, bert, t5, opt, neox, bloom])
def test_all_linear_resolves_to_names_that_hf_reads_the_same_way(build: Any) -> None:
    task = {"task_type": "SEQ_CLS"} if build is bert else {}
    with torch.device("meta"):
        ours, theirs = build(), build()
    selection = select(ours, Config(target_modules="all-linear", **task))
    theirs_chosen = hf_chooses(theirs, selection.resolved)
    assert sorted(selection.matched) == theirs_chosen

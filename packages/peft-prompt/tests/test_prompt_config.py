"""What the configs accept, what they take from a model, how prompts start, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from peft_core import CheckpointError, ConfigError, PeftModel, RequestError, TargetError, get_peft_model
from peft_prompt import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

N, VOCABULARY = 3, 32


def make(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": VOCABULARY, "num_key_value_heads": 2, **sizes, **fields})
    ).eval()


def table_of(model: Any, name: str = "default") -> torch.Tensor:
    found: torch.Tensor = model.get_adapter_state_dict(name)["prompt_embeddings"].detach()
    return found


class Words:
    """A tokenizer: each letter's place in the alphabet."""

    name_or_path = ""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "fields", "says"),
    [
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "needs a tokenizer"),
        (PromptTuningConfig, {"prompt_tuning_init": "NOISE"}, "one of RANDOM, TEXT, SAMPLE_VOCAB"),
        (PromptTuningConfig, {"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "one of RANDOM, TEXT, SAMPLE_VOCAB"),
        (PromptTuningConfig, {"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs are for"),
        (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        (PromptTuningConfig, {"modules_to_save": "score"}, "give a list of names"),
        (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "'MLP' or 'LSTM'"),
        (PromptEncoderConfig, {"encoder_dropout": 1.0}, "encoder_dropout"),
        (PrefixTuningConfig, {"init_weights": "one"}, "init_weights is 'zero'"),
        (
            MultitaskPromptTuningConfig,
            {"prompt_tuning_init": "EXACT_SOURCE_TASK"},
            "prompt_tuning_init_state_dict_path",
        ),
        (
            MultitaskPromptTuningConfig,
            {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": "x", "num_tasks": 2},
            "is for one target task",
        ),
        (AdaptionPromptConfig, {"adapter_len": 0}, "adapter_len"),
    ],
)
def test_values_that_mean_nothing_are_refused(config: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**fields)


def test_trust_is_not_a_matter_of_configs() -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "x"}
    with pytest.raises(ConfigError, match="cannot ask for trust_remote_code"):
        PromptTuningConfig(**fields, tokenizer_kwargs={"trust_remote_code": True})


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_the_number_of_tokens_is_needed_when_it_is_used(config: Any) -> None:
    with pytest.raises(TargetError, match="num_virtual_tokens is not given"):
        get_peft_model(make(), config())


def test_sizes_come_from_the_model() -> None:
    for config, width, heads in (
        (PromptTuningConfig(num_virtual_tokens=N), 16, 4),
        (PromptEncoderConfig(num_virtual_tokens=N), 16, 4),
        (PrefixTuningConfig(num_virtual_tokens=N), 8, 2),  # of keys
        (MultitaskPromptTuningConfig(num_virtual_tokens=N), 16, 4),
    ):
        found = get_peft_model(make(), config)._peft.record("default").config
        assert (found.token_dim, found.num_attention_heads, found.num_layers) == (width, heads, 2)
        assert (found.num_transformer_submodules, found.task_type) == (1, "CAUSAL_LM")
    found = get_peft_model(make(), AdaptionPromptConfig(adapter_len=N, adapter_layers=1))._peft.record("default").config
    assert (found.target_modules, found.task_type) == ("self_attn", "CAUSAL_LM")


def test_sizes_that_are_not_the_models_are_refused() -> None:
    with pytest.raises(TargetError, match="for 3 layers of keys of 8 numbers; this model has 2 of 8"):
        get_peft_model(make(), PrefixTuningConfig(num_virtual_tokens=N, num_layers=3))
    for config in (PromptTuningConfig, PromptEncoderConfig, MultitaskPromptTuningConfig):
        with pytest.raises(TargetError, match="token_dim is 8, and the model's embeddings have 16 numbers"):
            get_peft_model(make(), config(num_virtual_tokens=N, token_dim=8))


def test_models_that_have_no_place_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    for config in (
        PromptTuningConfig(num_virtual_tokens=N),
        PromptEncoderConfig(num_virtual_tokens=N),
        PrefixTuningConfig(num_virtual_tokens=N),
        MultitaskPromptTuningConfig(num_virtual_tokens=N),
        AdaptionPromptConfig(adapter_len=N, adapter_layers=1),
    ):
        with pytest.raises(TargetError, match="does not say which module is its backbone|not known"):
            get_peft_model(plain, config)  # type: ignore[type-var]
    assert type(plain) is nn.Sequential


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"adapter_layers": 1}, "give adapter_len"),
        ({"adapter_len": N}, "give adapter_len"),
        ({"adapter_len": N, "adapter_layers": 3}, "adapter_layers is 3; the model has 2"),
        ({"adapter_len": N, "adapter_layers": 1, "target_modules": "self_atn"}, "did you mean 'self_attn'"),
    ],
)
def test_layers_of_llama_adapter(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=rf"(?i){says}"):
        get_peft_model(make(), AdaptionPromptConfig(**fields))


def test_attention_with_a_norm_behind_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForCausalLM(RobertaConfig(vocab_size=VOCABULARY, is_decoder=True, **sizes))
    with pytest.raises(
        TargetError, match=r"layer.0.attention \(RobertaAttention\): it ends in a sum with its input and a norm"
    ):
        get_peft_model(model, AdaptionPromptConfig(adapter_len=N, adapter_layers=1))


def test_layers_are_counted_from_the_top() -> None:
    model = get_peft_model(make(num_hidden_layers=3), AdaptionPromptConfig(adapter_len=N, adapter_layers=2))
    attention, parts = "base_model.model.model.layers.{}.self_attn.adaption_{}", ("gate", "prompt")
    keys = sorted(model.get_adapter_state_dict())
    assert keys == [attention.format(layer, part) for layer in (1, 2) for part in parts]
    assert "default" not in type(model.model.layers[0].self_attn).__name__
    ids = torch.ones(1, 4, dtype=torch.long)
    assert torch.equal(model(ids).logits, make(num_hidden_layers=3)(ids).logits)  # the gate starts at 0


def test_flash_kernels_are_refused() -> None:
    model = get_peft_model(make(), AdaptionPromptConfig(adapter_len=N, adapter_layers=1))
    attention = model.model.layers[1].self_attn
    adapter = attention.adapters.default
    hidden = torch.zeros(1, 2, 16)
    adapter.layer.module.config._attn_implementation = "flash_attention_2"
    keys = torch.zeros(1, 2, N, 4)
    with pytest.raises(RequestError, match="attn_implementation='sdpa'"):
        adapter._attended(keys, keys, None, {"hidden_states": hidden})


# -- starts ------------------------------------------------------------------------------------------------------------


def test_random_tables_are_standard_normal() -> None:
    table = table_of(get_peft_model(make(), PromptTuningConfig(num_virtual_tokens=500)))
    assert abs(float(table.mean())) < 0.05 and abs(float(table.std()) - 1) < 0.05  # 8000 numbers: deviations of 0.01


def test_tables_of_tokens() -> None:
    model = get_peft_model(make(), PromptTuningConfig(num_virtual_tokens=9, prompt_tuning_init="SAMPLE_VOCAB"))
    rows = model.model.embed_tokens.weight.detach()
    assert all((row == rows).all(1).any() for row in table_of(model))
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "bead", "tokenizer_name_or_path": Words()}
    config = PromptTuningConfig(num_virtual_tokens=6, **fields)
    assert config.prompt_tuning_init_ids == (1, 4, 0, 3) and config.tokenizer_name_or_path is None
    model = get_peft_model(make(), config)
    assert torch.equal(table_of(model), rows[[1, 4, 0, 3, 1, 4]])
    model.add_adapter("m", MultitaskPromptTuningConfig(num_virtual_tokens=2, **fields))
    assert torch.equal(table_of(model, "m"), rows[[1, 4]])
    far = PromptTuningConfig(num_virtual_tokens=2, **{**fields, "prompt_tuning_init_text": "\x9a"})
    with pytest.raises(TargetError, match=r"gives the token 57, and the model has 32"):
        get_peft_model(make(), far)
    empty = {**fields, "prompt_tuning_init_text": "b", "tokenizer_name_or_path": lambda text: {"input_ids": []}}
    with pytest.raises(TargetError, match="makes no token of"):
        get_peft_model(make(), PromptTuningConfig(num_virtual_tokens=2, **empty))
    nowhere = PromptTuningConfig(num_virtual_tokens=2, **{**fields, "tokenizer_name_or_path": "no/such tokenizer"})
    with pytest.raises(TargetError, match="'no/such tokenizer' cannot be loaded"):
        get_peft_model(make(), nowhere)


def test_embeddings_are_scaled_as_the_model_scales_them() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **sizes)).eval()
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "b", "tokenizer_name_or_path": Words()}
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=1, **fields))
    torch.testing.assert_close(table_of(model)[0], model.model.embed_tokens.weight[1].detach() * 4)  # √16


def test_a_file_makes_nobody_look_for_a_tokenizer_or_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "b", "tokenizer_name_or_path": Words()}
    model = get_peft_model(make(), MultitaskPromptTuningConfig(num_virtual_tokens=N, **fields))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)  # the rest must be started anew
    source = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/secret.safetensors"}
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    import peft_prompt.multitask_prompt_tuning as method
    import peft_prompt.starts as starts

    def never(*args: Any) -> Any:
        raise AssertionError("the file's word was taken")

    monkeypatch.setattr(starts, "load_ids", never)
    monkeypatch.setattr(method, "source", never)
    for changed in ({"prompt_tuning_init_ids": None, "tokenizer_name_or_path": "someone/else"}, source):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, **changed}))
        loaded: Any = make()
        get_peft_model(loaded, PromptTuningConfig(num_virtual_tokens=1), "first")
        report = loaded.load_adapter(tmp_path, "second", strict=False)
        assert set(report.missing) == {"prefix_task_cols", "prefix_task_rows"}


# -- sources of target tasks -------------------------------------------------------------------------------------------


def source(directory: Path, **fields: Any) -> dict[str, torch.Tensor]:
    model = get_peft_model(make(), MultitaskPromptTuningConfig(num_virtual_tokens=N, num_tasks=3, **fields))
    model.save_pretrained(directory)
    return load_file(directory / "adapter_model.safetensors")


def target(start: str, path: Path, **fields: Any) -> dict[str, torch.Tensor]:
    how = {"prompt_tuning_init": start, "prompt_tuning_init_state_dict_path": str(path)}
    model = get_peft_model(make(), MultitaskPromptTuningConfig(num_virtual_tokens=N, **how, **fields))
    return {key: value.detach() for key, value in model.get_adapter_state_dict().items()}


def test_target_tasks_start_from_source_tasks(tmp_path: Path) -> None:
    found = source(tmp_path, num_ranks=2)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        mean = target("AVERAGE_SOURCE_TASKS", path, num_ranks=2)
        exact = target("EXACT_SOURCE_TASK", path, num_ranks=2, prompt_tuning_init_task=1)
        shared = target("ONLY_SOURCE_SHARED", path, num_ranks=1, num_tasks=4)
        for one in (mean, exact, shared):
            assert torch.equal(one["prompt_embeddings"], found["prompt_embeddings"])
        for name in ("prefix_task_cols", "prefix_task_rows"):
            torch.testing.assert_close(mean[name], found[name].mean(0, keepdim=True))
            assert torch.equal(exact[name], found[name][1:2])
            assert len(shared[name]) == 4


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source(tmp_path)
    with pytest.raises(TargetError, match=r"prompt_tuning_init_task is 3; .* has 3 tasks"):
        target("EXACT_SOURCE_TASK", tmp_path, prompt_tuning_init_task=3)
    with pytest.raises(TargetError, match=r"prefix_task_cols of the source has the shape \(1, 3, 1\)"):
        target("AVERAGE_SOURCE_TASKS", tmp_path, num_ranks=2)
    for name in ("adapter_model.bin", "source.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(TargetError, match="no .safetensors file, and no other is opened"):
            target("EXACT_SOURCE_TASK", tmp_path / name)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(TargetError, match="broken.safetensors"):
        target("EXACT_SOURCE_TASK", broken)


def test_a_file_does_not_say_where_it_started_from(tmp_path: Path) -> None:
    source(tmp_path)
    fields = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": str(tmp_path)}
    model = get_peft_model(make(), MultitaskPromptTuningConfig(num_virtual_tokens=N, **fields))
    model.save_pretrained(tmp_path / "target")
    stored = json.loads((tmp_path / "target" / "adapter_config.json").read_text())
    assert (stored["prompt_tuning_init"], stored["prompt_tuning_init_state_dict_path"]) == ("RANDOM", None)
    assert str(tmp_path).encode() not in (tmp_path / "target" / "adapter_model.safetensors").read_bytes()
    # It is the same adapter all the same: loading it again refills the tensors that an optimizer holds.
    before = list(model._peft.record("default").parameters())
    model.load_adapter(tmp_path / "target", "default", replace=True, is_trainable=True)
    assert all(one is other for one, other in zip(before, model._peft.record("default").parameters(), strict=True))


# -- files -------------------------------------------------------------------------------------------------------------


def test_heads_are_trained_and_saved_under_their_keys(tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes)).eval()

    model = get_peft_model(classifier(), PromptTuningConfig(num_virtual_tokens=N, task_type="SEQ_CLS"))
    assert sorted(model.get_adapter_state_dict()) == [
        "base_model.classifier.bias",
        "base_model.classifier.weight",
        "prompt_embeddings",
    ]
    with torch.no_grad():
        for parameter in model._peft.record("default").parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ids = torch.ones(2, 4, dtype=torch.long)
    assert torch.equal(PeftModel.from_pretrained(classifier(), tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(TargetError, match="modules_to_save: 'clasifier' matches no module"):
        get_peft_model(classifier(), PromptTuningConfig(num_virtual_tokens=N, modules_to_save=["clasifier"]))
    # By the first position, which is the first virtual one: the others only reach it through attention.
    out = model(ids, output_hidden_states=True)
    assert out.hidden_states[-1].shape[1] == N + 4


def test_a_file_whose_network_is_incomplete(tmp_path: Path) -> None:
    model = get_peft_model(make(), PromptEncoderConfig(num_virtual_tokens=N))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    found = load_file(file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**model.peft_config["default"].to_dict()}))
    save_file({key: value for key, value in found.items() if "mlp_head.2" not in key}, file)
    with pytest.raises(CheckpointError, match=r"missing[\s\S]*prompt_encoder.mlp_head.2.weight"):
        PeftModel.from_pretrained(make(), tmp_path)
    save_file({"prompt_embeddings": found["prompt_embeddings"]}, file)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    ids = torch.ones(1, 4, dtype=torch.long)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    with pytest.raises(TargetError, match="the prompt that a network made and not the network"):
        PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)


def test_importing_the_package_imports_nothing() -> None:
    code = (
        "import sys, peft_prompt; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules; "
        "assert dir(peft_prompt) == sorted(peft_prompt.__all__); peft_prompt.PromptTuningConfig; "
        "import peft_prompt.adaption_prompt, peft_prompt.multitask_prompt_tuning, peft_prompt.prefix_tuning; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import peft_prompt

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = peft_prompt.Nothing


def test_the_code_of_the_readme_runs() -> None:
    import peft_prompt

    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ids = torch.ones(2, 4, dtype=torch.long)
    names: dict[str, Any] = {"model": make(), "ids": ids, "mask": torch.ones_like(ids), "tokenizer": Words()}
    names |= {name: getattr(peft_prompt, name) for name in peft_prompt.__all__}
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert float(names["loss"].detach()) > 0

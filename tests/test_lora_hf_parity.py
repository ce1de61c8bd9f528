"""LoRA and HF PEFT read each other's files and compute the same, for every kind of layer.

The exceptions are HF's own mistakes, stated where they are: there ours follows the formula.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as hf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssForCausalLM

from peft_core import PeftModel, get_peft_model
from peft_lora import LoraConfig

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 48}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    **TOKENS,
}
IDS = torch.arange(20).view(2, 10)


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **options))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **TOKENS))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4))


class Convolutions(nn.Module):
    """One convolution after the other, of one, two and three dimensions."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, **options)
        self.two = nn.Conv2d(4, 8, 3, **options)
        self.three = nn.Conv3d(4, 8, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.one(x[..., 0, 0]), self.two(x[..., 0]), self.three(x)
        return torch.cat([out.flatten() for out in outputs])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.attn(x, x, x)[0]))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def pictures(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 2 * 4 * 5 * 6 * 7).view(2, 4, 5, 6, 7).sin())


def vectors(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16).sin())


@dataclass(frozen=True)
class Case:
    base: Callable[[], nn.Module]
    config: dict[str, Any]
    run: Callable[[nn.Module], Tensor] = logits
    # Keys that HF writes and we do not: whole tables of the base, next to an adapter of them.
    tables: tuple[str, ...] = ()


EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []}
TABLE, HEAD = "model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight"
CASES = {
    "defaults": Case(llama, {}),
    "all-linear": Case(llama, {"target_modules": "all-linear"}),
    "regex": Case(llama, {"target_modules": r".*\.[01]\.mlp\..*_proj"}),
    "layers": Case(llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "patterns": Case(
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "rslora": Case(llama, {"use_rslora": True}),
    "gaussian": Case(llama, {"init_lora_weights": "gaussian"}),
    "orthogonal": Case(llama, {"init_lora_weights": "orthogonal"}),
    "lora_bias": Case(llama, {"target_modules": ["q_proj", "lm_head"], "lora_bias": True}, tables=(HEAD,)),
    "dora": Case(llama, {"target_modules": "all-linear", "use_dora": True}),
    "gpt2": Case(gpt2, {}),
    "gpt2-all": Case(gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": Case(gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "gpt2-embeddings": Case(gpt2, {"target_modules": ["wte", "wpe"]}),
    "gpt2-bias-all": Case(gpt2, {"bias": "all"}),
    "gpt2-bias-own": Case(gpt2, {"bias": "lora_only"}),
    "embedding": Case(llama, {"target_modules": ["embed_tokens", "q_proj"]}, tables=(TABLE,)),
    "embedding-dora": Case(llama, {"target_modules": ["embed_tokens"], "use_dora": True}, tables=(TABLE,)),
    "tied-targets": Case(
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        tables=(TABLE, HEAD),
    ),
    "tied-but-alone": Case(
        lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}, tables=(TABLE,)
    ),
    "tokens": Case(llama, {"trainable_token_indices": [7, 3]}),
    "tokens-tied": Case(lambda: llama(tie_word_embeddings=True), {"trainable_token_indices": [7, 3]}),
    "tokens-named": Case(llama, {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}),
    "saved-head": Case(llama, {"modules_to_save": ["lm_head"]}),
    "saved-tied": Case(
        lambda: llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "mixtral": Case(mixtral, EXPERTS),
    "mixtral-one": Case(mixtral, {"target_parameters": ["experts.down_proj"]}),
    "mixtral-patterns": Case(mixtral, {**EXPERTS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}}),
    "mixtral-mixed": Case(mixtral, {**EXPERTS, "target_modules": ["q_proj", "o_proj"]}),
    "mixtral-router": Case(mixtral, {"target_parameters": ["gate.weight", "gate_up_proj"]}),
    "qwen3_moe": Case(qwen3_moe, EXPERTS),
    "gpt_oss-transposed": Case(gpt_oss, EXPERTS),
    "conv": Case(Convolutions, {"target_modules": ["one", "two", "three"]}, pictures),
    "conv-options": Case(
        lambda: Convolutions(stride=2, padding=1, bias=False), {"target_modules": ["one", "two", "three"]}, pictures
    ),
    "conv-groups": Case(
        lambda: Convolutions(groups=2, padding=1), {"target_modules": ["one", "two", "three"]}, pictures
    ),
    "conv-lora_bias": Case(Convolutions, {"target_modules": ["one", "two", "three"], "lora_bias": True}, pictures),
    "conv-dora": Case(Convolutions, {"target_modules": ["one", "two", "three"], "use_dora": True}, pictures),
    "bias-own": Case(Convolutions, {"target_modules": ["one", "two"], "bias": "lora_only"}, pictures),
    "bias-all": Case(Convolutions, {"target_modules": ["one", "two"], "bias": "all"}, pictures),
}


def base(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.base().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def settings(case: Case) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **case.config}


@contextmanager
def oracle() -> Iterator[None]:
    """HF's warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def move(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Random values for everything that trains."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def theirs(case: Case, directory: Path, values: bool = True) -> nn.Module:
    with oracle():
        model = hf.get_peft_model(base(case), hf.LoraConfig(**settings(case))).eval()
        if values:
            move(model)
        model.save_pretrained(directory)
    return model


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def close(one: Tensor, other: Tensor) -> None:
    """float32: some hundred additions in two orders, relative to the largest value."""
    assert (one - other).abs().max() <= 3e-6 * other.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_theirs_is_read_here(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = theirs(case, tmp_path / "theirs")
    mine = PeftModel.from_pretrained(base(case), tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = case.run(model)
        assert (expected - case.run(base(case))).abs().max() > 1e-3
        close(case.run(mine), expected)
    mine.save_pretrained(tmp_path / "mine")
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "mine")
    for table in case.tables:
        del before[f"base_model.model.{table}"]
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("name", CASES)
def test_mine_is_read_there(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    mine = get_peft_model(base(case), LoraConfig(**settings(case))).eval()
    move(mine)
    mine.save_pretrained(tmp_path)
    with oracle():
        model = hf.PeftModel.from_pretrained(base(case), tmp_path).eval()
        model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        close(case.run(model), case.run(mine))
    before, after = tensors(tmp_path), tensors(tmp_path / "again")
    assert before.keys() == after.keys() - {f"base_model.model.{table}" for table in case.tables}
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_the_config_files_say_the_same(tmp_path: Path) -> None:
    """Every field that both know has the same value and default; ours has no others."""
    theirs(CASES["gpt2"], tmp_path / "theirs", values=False)
    mine = get_peft_model(base(CASES["gpt2"]), LoraConfig(**settings(CASES["gpt2"])))
    mine.save_pretrained(tmp_path / "mine")
    old = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    new = json.loads((tmp_path / "mine/adapter_config.json").read_text())
    assert new.keys() <= old.keys()
    ignored = {"target_modules", "base_model_name_or_path", "peft_version", "auto_mapping"}
    assert {k: v for k, v in new.items() if k not in ignored} == {k: old[k] for k in new if k not in ignored}
    assert list(old["target_modules"]) == list(new["target_modules"])
    # Same names, in the same order.
    known = list(hf.LoraConfig.__dataclass_fields__)
    shared = [name for name in LoraConfig.model_fields if name in known]
    own = [name for name in LoraConfig.model_fields if name not in known]
    assert own == []
    lora_fields = shared[shared.index("r") :]
    assert lora_fields == sorted(lora_fields, key=known.index)


def test_attention_has_its_output_projections_part_once(tmp_path: Path) -> None:
    """HF adds s B A of the output projection twice. With that factor doubled here, the numbers are the same."""
    case = Case(Attention, {"target_modules": ["attn", "up"]}, vectors)
    model = theirs(case, tmp_path / "theirs")
    with torch.no_grad():
        expected = case.run(model)
        mine = PeftModel.from_pretrained(base(case), tmp_path / "theirs").eval()
        assert (case.run(mine) - expected).abs().max() > 1e-3
        values = tensors(tmp_path / "theirs")
        mine.save_pretrained(tmp_path / "mine")
        assert values.keys() == tensors(tmp_path / "mine").keys()
        values["base_model.model.attn.base_layer.out_proj.lora_B.weight"] *= 2
        save_file(values, tmp_path / "theirs/adapter_model.safetensors", {"format": "pt"})
        doubled = PeftModel.from_pretrained(base(case), tmp_path / "theirs").eval()
        close(case.run(doubled), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_attention_saves_all_the_biases_it_trains(bias: str, tmp_path: Path) -> None:
    """HF trains `in_proj_bias` with bias="all" and does not save it."""
    case = Case(Attention, {"target_modules": ["attn"], "bias": bias}, vectors)
    theirs(case, tmp_path / "theirs")
    mine = get_peft_model(base(case), LoraConfig(**settings(case)))
    mine.save_pretrained(tmp_path / "mine")
    more = tensors(tmp_path / "mine").keys() - tensors(tmp_path / "theirs").keys()
    assert more == {"base_model.model.attn.base_layer.in_proj_bias"}
    assert not tensors(tmp_path / "theirs").keys() - tensors(tmp_path / "mine").keys()


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode: str, tmp_path: Path) -> None:
    """HF's A pads with zeros whatever the layer does, so its forward is not what it merges to. Ours is."""
    case = Case(lambda: nn.ModuleDict({"two": nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode)}), {})
    case = Case(case.base, {"target_modules": ["two"]}, lambda model: model["two"](torch.ones(1, 4, 5, 5).cumsum(2)))
    model = theirs(case, tmp_path)
    mine = PeftModel.from_pretrained(base(case), tmp_path).eval()
    with torch.no_grad(), oracle():
        apart = case.run(model.base_model.model)
        model.merge_adapter()
        together = case.run(model.base_model.model)
        close(case.run(mine), together)
        assert (apart - together).abs().max() > 1e-3


def test_dilation(tmp_path: Path) -> None:
    """HF's A is not dilated: its output has another size and the sum fails. Ours is what HF merges to."""
    run = lambda model: model["two"](torch.ones(1, 4, 7, 7).cumsum(2))  # noqa: E731
    make = lambda: nn.ModuleDict({"two": nn.Conv2d(4, 8, 3, dilation=2)})  # noqa: E731
    case = Case(make, {"target_modules": ["two"]}, run)
    model = theirs(case, tmp_path)
    mine = PeftModel.from_pretrained(base(case), tmp_path).eval()
    with torch.no_grad(), oracle():
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(model.base_model.model)
        model.merge_adapter()
        close(run(mine), run(model.base_model.model))


def test_attention_inside_an_encoder_layer_is_not_passed_by(tmp_path: Path) -> None:
    """torch's fused kernel for `nn.TransformerEncoderLayer` reads weights past the modules; in HF it skips adapters."""

    def make() -> nn.Module:
        return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

    for targets in (["self_attn"], ["linear1"]):
        model = get_peft_model(base(Case(make, {})), LoraConfig(r=4, target_modules=targets)).eval()
        move(model)
        with torch.no_grad():
            out = vectors(model)
            assert (out - vectors(base(Case(make, {})))).abs().max() > 1e-3
        close(out, vectors(model).detach())
        model.merge_adapter()
        with torch.no_grad():
            close(vectors(model), out)


def test_hf_s_conversion_of_a_start_that_moved_the_base_loads(tmp_path: Path) -> None:
    """HF's own conversion (path_initial_model_for_weight_conversion) gives a plain LoRA."""
    case = Case(llama, {"init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"]})
    with oracle():
        model = hf.get_peft_model(base(case), hf.LoraConfig(**settings(case))).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        move(model)
        expected = logits(model).detach()
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    mine = PeftModel.from_pretrained(base(case), tmp_path / "plain").eval()
    with torch.no_grad():
        # The base was changed and changed back, in float32.
        assert (logits(mine) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_mica_loads_with_b_frozen(tmp_path: Path) -> None:
    case = Case(llama, {"init_lora_weights": "mica"})
    model = theirs(case, tmp_path)
    mine = PeftModel.from_pretrained(base(case), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        close(logits(mine), logits(model))
    assert {name.rpartition(".")[2] for name, p in mine.named_parameters() if p.requires_grad} == {"lora_A"}


def test_eva_loads(tmp_path: Path) -> None:
    """EVA chooses A from data and leaves the base as it is: its file is a plain LoRA with ranks of its own."""
    case = CASES["patterns"]
    model = theirs(case, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"init_lora_weights": "eva", "eva_config": hf.EvaConfig().__dict__}
    path.write_text(json.dumps(config))
    mine = PeftModel.from_pretrained(base(case), tmp_path).eval()
    with torch.no_grad():
        close(logits(mine), logits(model))
    mine.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base(case), tmp_path / "again").eval()
    with torch.no_grad():
        close(logits(again), logits(model))

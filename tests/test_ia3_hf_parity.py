"""IA3 and HF PEFT read each other's files and compute the same; the exceptions are stated where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft as hf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_core import ConfigError, PeftModel, TargetError, get_peft_model, plan
from peft_ia3 import IA3Config

# HF PEFT's own: an old name in transformers, and remarks on what it does with GPT-2's layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 48}
IDS = torch.arange(3, 23).view(2, 10)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **TOKENS,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=48, pad_token_id=2, eos_token_id=1, decoder_start_token_id=2)
    )


class Convolutions(nn.Module):
    """Images (batch, 4, 9, 8) -> (batch, 5)"""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).relu()).mean((2, 3)))
        return out


class Volumes(nn.Module):
    """(batch, 4, 5, 6, 4) -> (batch, 8)"""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 6, 3, padding=1)
        self.second = nn.Conv3d(6, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu()).mean((2, 3, 4))
        return out


@dataclass
class Case:
    model: Callable[[], nn.Module]
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama-defaults": Case(llama, {"input_ids": IDS}),
    "t5-defaults": Case(t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}),
    "gpt2-defaults": Case(gpt2, {"input_ids": IDS}),
    "llama-names": Case(
        llama,
        {"input_ids": IDS},
        {"target_modules": ["q_proj", "mlp.up_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "llama-regex": Case(
        llama,
        {"input_ids": IDS},
        {"target_modules": r".*(q_proj|up_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
    ),
    "llama-no-feedforward": Case(
        llama, {"input_ids": IDS}, {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": []}
    ),
    "gpt2-names": Case(
        gpt2, {"input_ids": IDS}, {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_fc"]}
    ),
    "conv2d": Case(
        Convolutions,
        {"x": torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))},
        {"target_modules": ["first", "second", "head"], "feedforward_modules": ["second"]},
    ),
    "conv3d": Case(
        Volumes,
        {"x": torch.randn(2, 4, 5, 6, 4, generator=torch.Generator().manual_seed(0))},
        {"target_modules": ["first", "second"], "feedforward_modules": ["first"]},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case: Case) -> Any:
    torch.manual_seed(0)
    return case.model().eval()


def output(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        found = model(**case.inputs)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(1, 0.5, generator=generator)


def close(one: Tensor, other: Tensor) -> None:
    # float32: the same operations, but for attention's order of additions on some layouts.
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * max(1.0, other.abs().max().item()))


@every_case
@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_theirs_loads_here(case: Case, merged: bool, tmp_path: Path) -> None:
    theirs = hf.get_peft_model(make(case), hf.IA3Config(**case.options))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(case), tmp_path)
    state, mine = load_file(tmp_path / "adapter_model.safetensors"), ours.get_adapter_state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[key], state[key]) for key in mine)
    assert not torch.allclose(output(ours, case), output(make(case), case))
    expected = output(theirs, case)
    if merged:
        ours.merge_adapter()
    close(output(ours, case), expected)


@every_case
def test_ours_loads_there(case: Case, tmp_path: Path) -> None:
    ours = get_peft_model(make(case), IA3Config(**case.options))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = hf.PeftModel.from_pretrained(make(case), tmp_path)
    state, written = hf.get_peft_model_state_dict(theirs), load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in written)
    close(output(theirs, case), output(ours, case))


@every_case
def test_the_same_tensors_are_trained(case: Case) -> None:
    theirs = hf.get_peft_model(make(case), hf.IA3Config(**case.options))
    ours = get_peft_model(make(case), IA3Config(**case.options))
    shapes = {key: tuple(tensor.shape) for key, tensor in hf.get_peft_model_state_dict(theirs).items()}
    assert {key: tuple(tensor.shape) for key, tensor in ours.get_adapter_state_dict().items()} == shapes
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@every_case
def test_the_config_says_what_was_done(case: Case, tmp_path: Path) -> None:
    """Targets and feed-forward layers that were left open are written as they were understood."""
    for library, folder in ((hf, "theirs"), (None, "ours")):
        if library:
            model = hf.get_peft_model(make(case), hf.IA3Config(**case.options))
        else:
            model = get_peft_model(make(case), IA3Config(**case.options))
        model.save_pretrained(tmp_path / folder)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    for name in ("target_modules", "feedforward_modules"):
        theirs, ours = (config[name] for config in configs)
        # HF's lists come out of sets, in any order.
        assert (theirs if isinstance(theirs, str) else sorted(theirs)) == (
            ours if isinstance(ours, str) else sorted(ours)
        )


class TestWhereWeDiffer:
    def test_names_are_whole(self, tmp_path: Path) -> None:
        """HF takes "first" for a name of "prefirst" too; ours does not, but reads its file as it was meant."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.prefirst = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.first(self.prefirst(x))
                return out

        case = Case(Net, {"x": torch.ones(2, 4)})
        options = {"target_modules": ["first", "prefirst"], "feedforward_modules": ["first"]}
        theirs = hf.get_peft_model(make(case), hf.IA3Config(**options))
        ours = get_peft_model(make(case), IA3Config(**options))
        key = "base_model.model.prefirst.ia3_l"
        assert hf.get_peft_model_state_dict(theirs)[key].shape == (1, 4)
        assert ours.get_adapter_state_dict()[key].shape == (4, 1)
        randomize(theirs)
        theirs.save_pretrained(tmp_path)
        close(output(PeftModel.from_pretrained(make(case), tmp_path), case), output(theirs, case))

    def test_targets_without_the_feedforward_layers(self, tmp_path: Path) -> None:
        """HF writes feed-forward names that are no targets, and then refuses its own file."""
        case = Case(llama, {"input_ids": IDS})
        theirs = hf.get_peft_model(make(case), hf.IA3Config(target_modules=["q_proj"]))
        theirs.save_pretrained(tmp_path / "theirs")
        with pytest.raises(ValueError, match="subset"):
            hf.PeftModel.from_pretrained(make(case), tmp_path / "theirs")
        ours = get_peft_model(make(case), IA3Config(target_modules=["q_proj"]))
        assert ours.peft_config["default"].feedforward_modules == ()
        ours.save_pretrained(tmp_path / "ours")
        hf.PeftModel.from_pretrained(make(case), tmp_path / "ours")

    def test_one_dimensional_convolutions(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(4, 4, 1)

        options = {"target_modules": ["conv"], "feedforward_modules": []}
        with pytest.raises(ValueError, match="not supported"):
            hf.get_peft_model(Net(), hf.IA3Config(**options))
        assert get_peft_model(Net(), IA3Config(**options)).get_nb_trainable_parameters()[0] == 4

    def test_one_name_for_both_kinds_of_layer(self) -> None:
        """GPT-2's `c_proj` ends both parts of a block: only the feed-forward one is rescaled at its input."""
        model = get_peft_model(gpt2(), IA3Config(target_modules=["c_proj"]))
        assert model.peft_config["default"].feedforward_modules == ("mlp.c_proj",)
        shapes = {key.removeprefix("base_model.model.transformer."): tuple(tensor.shape)
                  for key, tensor in model.get_adapter_state_dict().items()}  # fmt: skip
        assert shapes["h.0.mlp.c_proj.ia3_l"] == (1, 64)
        assert shapes["h.0.attn.c_proj.ia3_l"] == (16, 1)


class TestFeedforward:
    def test_unknown_model_types_are_asked_about(self) -> None:
        for kind in (hf.IA3Config, IA3Config):
            adapt = hf.get_peft_model if kind is hf.IA3Config else get_peft_model
            with pytest.raises(ValueError, match="feedforward_modules"):
                adapt(Convolutions(), kind(target_modules=["head"]))

    def test_names_that_no_target_answers_to(self) -> None:
        with pytest.raises(TargetError, match="'up_proj'"):
            get_peft_model(llama(), IA3Config(target_modules=r".*q_proj", feedforward_modules=["up_proj"]))

    def test_names_outside_the_targets(self) -> None:
        for kind in (hf.IA3Config, IA3Config):
            with pytest.raises(ValueError, match="feedforward_modules"):
                kind(target_modules=["q_proj"], feedforward_modules=["up_proj"])

    def test_the_plan_shows_it(self) -> None:
        table = plan(llama(), IA3Config())
        assert {site.path.rpartition(".")[2]: site.parameters for site in table.sites} == {
            "k_proj": 8,
            "v_proj": 8,
            "down_proj": 24,
        }
        assert table.config.feedforward_modules == ("down_proj",)  # type: ignore[attr-defined]


def test_errors_have_our_types() -> None:
    with pytest.raises(ConfigError):
        IA3Config(target_modules=["q_proj"], feedforward_modules=["up_proj"])

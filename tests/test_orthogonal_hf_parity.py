"""OFT and BOFT beside HF PEFT: each reads the other's files and computes the same, where HF's does what it says.

Where it does not (kernels larger than one in OFT, several butterfly factors), ours follows the formula, and the test
says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft as hf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_core import (
    ConfigError,
    PeftModel,
    TargetError,
    get_peft_model,
    load_method,
)

pytestmark = [
    # HF PEFT asks the model for a name that transformers has deprecated, and remarks on what it rounds and drops.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Invalid .*(oft_block_size|r).:UserWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments.*round_block_size:UserWarning"),
]

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 48}
IDS = torch.arange(20).view(2, 10)
HF: dict[str, Any] = {"oft": hf.OFTConfig, "boft": hf.BOFTConfig}


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **TOKENS))


class Convolutions(nn.Module):
    """(batch, 8, 6, 5) -> numbers; kernels of one, and larger ones."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2, stride=2)
        self.plane = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        point, plane = self.point(x), self.plane(x)
        return torch.cat([self.head((point + plane).mean((2, 3))).flatten(), self.grouped(x).flatten()])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pictures(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 8 * 6 * 5).view(2, 8, 6, 5).sin())


@dataclass(frozen=True)
class Case:
    method: str
    base: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[[nn.Module], Tensor] = logits


ALL = {"target_modules": "all-linear"}
EXACT = {"use_cayley_neumann": False}
CASES = {
    "oft-defaults": Case("oft", llama),
    "oft-exact": Case("oft", llama, {**ALL, **EXACT, "oft_block_size": 8}),
    **{
        f"oft-{terms}-terms": Case("oft", llama, {**ALL, "oft_block_size": 8, "num_cayley_neumann_terms": terms})
        for terms in (2, 3, 4, 6)
    },
    "oft-number": Case("oft", llama, {**ALL, **EXACT, "oft_block_size": 0, "r": 4}),
    "oft-share": Case("oft", llama, {**ALL, "oft_block_size": 8, "block_share": True}),
    "oft-constrained": Case("oft", llama, {**ALL, **EXACT, "oft_block_size": 8, "coft": True, "eps": 0.3}),
    "oft-constrained-share": Case(
        "oft", llama, {**ALL, **EXACT, "oft_block_size": 8, "coft": True, "eps": 0.3, "block_share": True}
    ),
    "oft-embedding": Case("oft", llama, {"target_modules": ["embed_tokens", "q_proj"], "oft_block_size": 4}),
    "oft-conv": Case(
        "oft", Convolutions, {"target_modules": ["point", "grouped", "head"], "oft_block_size": 4}, pictures
    ),
    "oft-random": Case("oft", llama, {**ALL, "oft_block_size": 8, "init_weights": False}),
    "oft-bias": Case(
        "oft", Convolutions, {"target_modules": ["point", "head"], "oft_block_size": 4, "bias": "oft_only"}, pictures
    ),
    "oft-bias-all": Case(
        "oft", Convolutions, {"target_modules": ["head"], "oft_block_size": 4, "bias": "all"}, pictures
    ),
    "boft-bias": Case(
        "boft",
        Convolutions,
        {"target_modules": ["plane", "head"], "bias": "boft_only", "init_weights": False},
        pictures,
    ),
    "boft-bias-all": Case("boft", Convolutions, {"target_modules": ["head"], "bias": "all"}, pictures),
    "boft-defaults": Case("boft", llama),
    "boft-all": Case("boft", llama, {**ALL, "boft_block_size": 8}),
    "boft-number": Case("boft", llama, {**ALL, "boft_block_size": 0, "boft_block_num": 4}),
    "boft-random": Case("boft", llama, {**ALL, "init_weights": False}),
    "boft-conv": Case(
        "boft", Convolutions, {"target_modules": ["point", "plane", "head"], "boft_block_size": 4}, pictures
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case: Case) -> Any:
    torch.manual_seed(0)
    return case.base().eval()


def theirs_of(case: Case) -> Any:
    return hf.get_peft_model(make(case), HF[case.method](**case.options))


def ours_of(case: Case) -> Any:
    return get_peft_model(make(case), load_method(case.method)(**case.options))


def randomise(model: nn.Module) -> None:
    """Moderate rotations: the series is far from the exact transform, but does not blow up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))


def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the table of the base that HF writes along where an embedding is adapted."""
    return {key: tensor for key, tensor in state.items() if not key.endswith("base_layer.weight")}


def close(one: Tensor, other: Tensor) -> None:
    # float32: rotated activations against rotated weights, two layers deep, on values of the size of `other`'s largest.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


@every_case
@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_theirs_loads_here(case: Case, merged: bool, tmp_path: Path) -> None:
    theirs = theirs_of(case)
    randomise(theirs)
    expected = case.run(theirs.eval())  # constrained: HF's forward writes into the parameters, so before they are saved
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(case), tmp_path)
    state, mine = own(load_file(tmp_path / "adapter_model.safetensors")), ours.get_adapter_state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[key], state[key]) for key in mine)
    if merged:
        ours.merge_adapter()
    found = case.run(ours)
    assert float((found - case.run(make(case))).abs().max()) > 1e-3
    close(found, expected)


@every_case
def test_ours_loads_there(case: Case, tmp_path: Path) -> None:
    ours = ours_of(case)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path)
    theirs = hf.PeftModel.from_pretrained(make(case), tmp_path)
    state, written = own(hf.get_peft_model_state_dict(theirs)), load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in written)
    found = case.run(ours)
    assert float((found - case.run(make(case))).abs().max()) > 1e-3
    close(case.run(theirs), found)


@every_case
def test_the_same_tensors_and_start(case: Case) -> None:
    theirs, ours = own(hf.get_peft_model_state_dict(theirs_of(case))), ours_of(case).get_adapter_state_dict()
    assert {k: tuple(t.shape) for k, t in ours.items()} == {k: tuple(t.shape) for k, t in theirs.items()}
    for key, tensor in theirs.items():
        # The same numbers where they are fixed; where they are drawn, 500 numbers or more, the same spread within 12 %.
        if tensor.numel() >= 500 and tensor.std() > 0:
            assert abs(float(ours[key].std() / tensor.std()) - 1) < 0.12, key
        elif tensor.std() == 0:
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("method", HF)
def test_defaults_are_theirs(method: str) -> None:
    mine: Any = load_method(method)()
    fields = set(type(mine).model_fields) - {"round_block_size"}
    other = HF[method]()
    assert {f: getattr(mine, f) for f in fields} == {f: getattr(other, f) for f in fields}


@pytest.mark.parametrize("method", HF)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_gpt2_has_defaults_that_work(method: str, tmp_path: Path) -> None:
    """HF's defaults name a layer that its own OFT and BOFT refuse."""
    with pytest.raises((ValueError, TypeError), match="not supported"):
        hf.get_peft_model(gpt2(), HF[method]())
    case = Case(method, gpt2)
    ours = ours_of(case)
    randomise(ours)
    expected = logits(ours.eval())
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(case), tmp_path)
    assert torch.equal(logits(again), expected)
    again.merge_adapter()
    close(logits(again), expected)


def oft_factor(rows: Tensor) -> Tensor:
    """(I + Q)(I - Q)⁻¹ of OFT's rows, as one dense block-diagonal matrix, written out."""
    b = (1 + int((1 + 8 * rows.shape[1]) ** 0.5)) // 2
    blocks = []
    for row in rows.double():
        q, numbers = torch.zeros(b, b, dtype=torch.float64), iter(row.tolist())
        for i in range(b):
            for j in range(i + 1, b):
                q[i, j] = next(numbers)
        q = q - q.T
        eye = torch.eye(b, dtype=torch.float64)
        blocks.append((eye + q) @ torch.linalg.inv(eye - q))
    return torch.block_diag(*blocks)


class TestWhereTheyAreWrong:
    def test_large_kernels_of_oft(self) -> None:
        """HF's differs from the base before anything is trained, and from its own merge; ours is the formula."""
        case = Case("oft", Convolutions, {"target_modules": ["plane"], "oft_block_size": 4, **EXACT}, pictures)
        theirs, ours = theirs_of(case), ours_of(case)
        base = pictures(make(case))
        assert float((pictures(theirs.eval()) - base).abs().max()) > 0.1
        assert torch.equal(pictures(ours.eval()), base) or float((pictures(ours) - base).abs().max()) < 1e-6
        randomise(ours)
        plain = make(case).double()
        weight = plain.plane.weight.data
        rotation = oft_factor(ours.get_adapter_state_dict()["base_model.model.plane.oft_R.weight"]).T
        plain.plane.weight.data = (weight.flatten(1) @ rotation.T).view_as(weight)
        with torch.no_grad():
            expected = plain(torch.linspace(-1, 1, 480, dtype=torch.float64).view(2, 8, 6, 5).sin())
        close(pictures(ours).double(), expected)

    def test_several_factors(self, tmp_path: Path) -> None:
        """HF makes one factor of any number where its CUDA extension does not compile; its file is read as meant."""
        case = Case("boft", llama, {**ALL, "boft_block_size": 4, "boft_n_butterfly_factor": 2})
        theirs, ours = theirs_of(case), ours_of(case)
        key = "base_model.model.model.layers.0.self_attn.q_proj.boft_R"
        assert hf.get_peft_model_state_dict(theirs)[key].shape == (1, 8, 4, 4)
        assert ours.get_adapter_state_dict()[key].shape == (2, 8, 4, 4)
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="boft_n_butterfly_factor=2, but its tensors have one"):
            again = PeftModel.from_pretrained(make(case), tmp_path)
        close(logits(again), logits(theirs))

    def test_module_dropout(self) -> None:
        """HF's is never applied. Ours is, in training alone."""
        case = Case("oft", llama, {**ALL, "oft_block_size": 8, "module_dropout": 0.5})
        for model, acts in ((theirs_of(case), False), (ours_of(case), True)):
            randomise(model)
            model.train()
            assert torch.equal(logits(model), logits(model)) is not acts
            model.eval()
            assert torch.equal(logits(model), logits(model))

    def test_one_dimension_and_dilation_are_refused_there(self) -> None:
        for layer in (nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1, dilation=2)):
            with pytest.raises((ValueError, TypeError), match="not supported"):
                hf.get_peft_model(nn.Sequential(layer), hf.OFTConfig(target_modules=["0"], oft_block_size=4))


class TestSizes:
    @pytest.mark.parametrize("size", [3, 5, 7, 9, 20, 40, 100])
    def test_the_switch_rounds_as_they_do(self, size: int, tmp_path: Path) -> None:
        """48 and 32 inputs; HF rounds unasked. A file of either is read by the other."""
        case = Case("oft", llama, {**ALL, "oft_block_size": size})
        with pytest.raises(TargetError, match=r"oft_block_size in \[2, 3, 4, 6, 8, 12, 16, 24, 48\]"):
            ours_of(Case("oft", llama, {"target_modules": ["down_proj"], "oft_block_size": 5}))
        theirs = theirs_of(case)
        ours = get_peft_model(make(case), load_method("oft")(**case.options, round_block_size=True))
        state = hf.get_peft_model_state_dict(theirs)
        assert {k: t.shape for k, t in ours.get_adapter_state_dict().items()} == {k: t.shape for k, t in state.items()}
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        close(logits(PeftModel.from_pretrained(make(case), tmp_path / "theirs")), logits(theirs))
        randomise(ours)
        ours.eval().save_pretrained(tmp_path / "ours")
        close(logits(hf.PeftModel.from_pretrained(make(case), tmp_path / "ours")), logits(ours))

    def test_numbers_of_blocks_round_as_they_do(self) -> None:
        for number in (3, 5, 7, 9, 20):
            options = {**ALL, "oft_block_size": 0, "r": number}
            theirs = hf.get_peft_model_state_dict(theirs_of(Case("oft", llama, options)))
            ours = get_peft_model(
                llama(), load_method("oft")(**options, round_block_size=True)
            ).get_adapter_state_dict()
            assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}


class TestOtherFiles:
    def write(self, place: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        (place / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
        return place

    def config(self, **changes: Any) -> dict[str, Any]:
        fields = {"target_modules": ["q_proj"], "r": 0, "oft_block_size": 8, "peft_version": "0.21.2"}
        return {"peft_type": "OFT", **fields, **changes}

    def test_the_first_version_is_refused(self, tmp_path: Path) -> None:
        key = "base_model.model.model.layers.{}.self_attn.q_proj"
        old = self.config(r=4)
        del old["oft_block_size"]
        place = self.write(tmp_path, old, {f"{key.format(0)}.oft_r": torch.zeros(4, 8, 8)})
        with pytest.raises(ConfigError, match="first version"):
            PeftModel.from_pretrained(llama(), place)
        tensors = {f"{key.format(i)}.oft_r.weight": torch.zeros(4, 8, 8) for i in range(2)}
        place = self.write(tmp_path, self.config(), tensors)
        with pytest.raises(TargetError, match="first version"):
            PeftModel.from_pretrained(llama(), place)

    def tensors(self, rows: int = 4) -> dict[str, Tensor]:
        key = "base_model.model.model.layers.{}.self_attn.q_proj.oft_R.weight"
        return {key.format(i): torch.full((rows, 28), 0.05) for i in range(2)}

    def test_an_older_series_draws_a_warning(self, tmp_path: Path) -> None:
        place = self.write(tmp_path, self.config(peft_version="0.17.1", use_cayley_neumann=True), self.tensors())
        with pytest.warns(UserWarning, match=r"peft 0\.17\.1"):
            PeftModel.from_pretrained(llama(), place)
        place = self.write(tmp_path, self.config(peft_version="0.17.1", use_cayley_neumann=False), self.tensors())
        PeftModel.from_pretrained(llama(), place)

    def test_blocks_that_are_not_the_layers(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match=r"\(3, 28\), which are not the blocks of 32 features"):
            PeftModel.from_pretrained(llama(), self.write(tmp_path, self.config(), self.tensors(3)))

    def test_the_flag_turns_the_rotation_round(self, tmp_path: Path) -> None:
        """The same tensors, small enough for the series: one flag's weight is rotated back by the other's."""
        weights = []
        for flag in (True, False):
            place = self.write(
                tmp_path, self.config(use_cayley_neumann=flag, num_cayley_neumann_terms=9), self.tensors()
            )
            torch.manual_seed(0)
            ours = PeftModel.from_pretrained(llama(), place).merge_and_unload()
            torch.manual_seed(0)
            theirs = hf.PeftModel.from_pretrained(llama(), place).merge_and_unload()
            weight = ours.model.layers[0].self_attn.q_proj.weight.detach()
            close(weight, theirs.model.layers[0].self_attn.q_proj.weight.detach())
            weights.append(weight)
        torch.manual_seed(0)
        plain = llama().model.layers[0].self_attn.q_proj.weight.detach()
        rotation = oft_factor(self.tensors()[next(iter(self.tensors()))]).float()
        close(weights[0], plain @ rotation.T)
        close(weights[1], plain @ rotation)
        assert float((weights[0] - weights[1]).abs().max()) > 1e-2

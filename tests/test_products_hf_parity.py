"""LoHa and LoKr beside HF PEFT: each reads the other's files and computes the same, for every layer and option.

Where HF's forward and its merge differ (convolutions with dilation or padding modes), ours is what the merge says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft as hf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_core import PeftModel, get_peft_model, load_method

# HF PEFT asks the model for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 48}
IDS = torch.arange(20).view(2, 10)
HF: dict[str, Any] = {"loha": hf.LoHaConfig, "lokr": hf.LoKrConfig}


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **TOKENS))


class Convolutions(nn.Module):
    """One and two axes; large, pointwise, uneven and grouped kernels."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.line = nn.Conv1d(6, 20, 3, **options)
        self.plane = nn.Conv2d(6, 20, 3, **options)
        self.uneven = nn.Conv2d(6, 20, (1, 3), **options)
        self.point = nn.Conv2d(6, 20, 1)
        self.groups = nn.Conv2d(6, 20, 3, groups=2, **options)

    def forward(self, x: Tensor) -> Tensor:
        planes = [layer(x).flatten() for layer in (self.plane, self.uneven, self.point, self.groups)]
        return torch.cat([self.line(x[..., 0]).flatten(), *planes])


PLACES = ["line", "plane", "uneven", "point", "groups"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pictures(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 6 * 8 * 7).view(2, 6, 8, 7).sin())


@dataclass(frozen=True)
class Case:
    method: str
    base: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[[nn.Module], Tensor] = logits
    attached: bool = True
    """Whether HF's forward is what its own merged weights compute."""


ALL = {"target_modules": "all-linear"}
CONV: dict[str, Any] = {"target_modules": PLACES}
PATTERNS = {
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
    "alpha_pattern": {"up_proj": 5},
}


def convolutions(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Convolutions(**options)


CASES = {
    "loha-defaults": Case("loha", llama),
    "loha-all": Case("loha", llama, {**ALL, "r": 3, "alpha": 7}),
    "loha-patterns": Case("loha", llama, PATTERNS),
    "loha-layers": Case("loha", llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "loha-random": Case("loha", llama, {**ALL, "init_weights": False}),
    "loha-conv": Case("loha", Convolutions, CONV, pictures),
    "loha-conv-factored": Case("loha", Convolutions, {**CONV, "r": 2}, pictures),
    "loha-conv-tucker": Case("loha", Convolutions, {**CONV, "r": 3, "use_effective_conv2d": True}, pictures),
    "loha-conv-stride": Case("loha", convolutions(stride=2, padding=1), CONV, pictures),
    "loha-conv-dilation": Case("loha", convolutions(dilation=2, padding=2), CONV, pictures, attached=False),
    "loha-conv-reflect": Case("loha", convolutions(padding=1, padding_mode="reflect"), CONV, pictures, attached=False),
    "lokr-defaults": Case("lokr", llama),
    "lokr-all": Case("lokr", llama, {**ALL, "r": 2, "alpha": 7}),
    "lokr-both": Case("lokr", llama, {**ALL, "r": 2, "decompose_both": True}),
    "lokr-factor": Case("lokr", llama, {**ALL, "r": 3, "decompose_factor": 4}),
    "lokr-factor-that-does-not-divide": Case("lokr", llama, {**ALL, "r": 3, "decompose_factor": 5}),
    "lokr-patterns": Case("lokr", llama, PATTERNS),
    "lokr-lycoris": Case("lokr", llama, {**ALL, "init_weights": "lycoris"}),
    "lokr-random": Case("lokr", llama, {**ALL, "init_weights": False, "r": 2}),
    "lokr-conv": Case("lokr", Convolutions, CONV, pictures),
    "lokr-conv-low-rank": Case("lokr", Convolutions, {**CONV, "r": 1, "decompose_factor": 2}, pictures),
    "lokr-conv-tucker": Case(
        "lokr",
        Convolutions,
        {"target_modules": PLACES[1:], "r": 2, "use_effective_conv2d": True, "decompose_factor": 2},
        pictures,
    ),
    "lokr-conv-both": Case(
        "lokr", Convolutions, {**CONV, "r": 1, "decompose_both": True, "decompose_factor": 5}, pictures
    ),
    "lokr-conv-stride": Case("lokr", convolutions(stride=2, padding=1), CONV, pictures),
    "lokr-conv-dilation": Case("lokr", convolutions(dilation=2, padding=2), CONV, pictures, attached=False),
    "lokr-conv-reflect": Case("lokr", convolutions(padding=1, padding_mode="reflect"), CONV, pictures, attached=False),
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
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.5, generator=generator)


def output(model: Any, case: Case) -> Tensor:
    """Of HF's model: from its merged weights where its forward is something else."""
    if case.attached or not isinstance(model, hf.PeftModel):
        return case.run(model)
    return case.run(model.merge_and_unload())


def close(one: Tensor, other: Tensor) -> None:
    # float32: sums over ranks and inputs in another order, on values that differ little in size.
    torch.testing.assert_close(one, other, rtol=0, atol=3e-5 * max(1.0, float(other.abs().max())))


@every_case
@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_theirs_loads_here(case: Case, merged: bool, tmp_path: Path) -> None:
    theirs = theirs_of(case)
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(case), tmp_path)
    state, mine = load_file(tmp_path / "adapter_model.safetensors"), ours.get_adapter_state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[key], state[key]) for key in mine)
    if merged:
        ours.merge_adapter()
    found = case.run(ours)
    assert float((found - case.run(make(case))).abs().max()) > 1e-3
    close(found, output(theirs, case))


@every_case
def test_ours_loads_there(case: Case, tmp_path: Path) -> None:
    ours = ours_of(case)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path)
    theirs = hf.PeftModel.from_pretrained(make(case), tmp_path)
    state, written = hf.get_peft_model_state_dict(theirs), load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in written)
    found = case.run(ours)
    close(found, output(theirs, case))


@every_case
def test_the_same_tensors_and_start(case: Case) -> None:
    """Names and shapes; and which of them are zero at the start."""
    theirs, ours = hf.get_peft_model_state_dict(theirs_of(case)), ours_of(case).get_adapter_state_dict()
    assert {k: tuple(t.shape) for k, t in ours.items()} == {k: tuple(t.shape) for k, t in theirs.items()}
    assert [k for k, t in ours.items() if not t.any()] == [k for k in ours if not theirs[k].any()]
    for key, tensor in theirs.items():
        if tensor.any() and tensor.numel() > 100:  # the same distribution, by its width
            ratio = float((ours[key].abs().max() / tensor.abs().max()).detach())
            assert 0.75 < ratio < 1.33, key


@pytest.mark.parametrize("method", HF)
def test_defaults_are_theirs(method: str) -> None:
    mine: Any = load_method(method)()
    fields = type(mine).model_fields
    other = HF[method]()
    assert {f: getattr(mine, f) for f in fields} == {f: getattr(other, f) for f in fields}


@pytest.mark.parametrize("method", HF)
def test_gpt2_has_defaults_that_work(method: str, tmp_path: Path) -> None:
    """HF's defaults name a layer that its own LoHa and LoKr refuse."""
    with pytest.raises(TypeError, match="not supported"):
        hf.get_peft_model(gpt2(), HF[method](init_weights=False))
    torch.manual_seed(0)
    model = get_peft_model(gpt2().eval(), load_method(method)(init_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(gpt2().eval(), tmp_path)
    assert torch.equal(logits(again), expected)
    again.merge_adapter()
    close(logits(again), expected)


def test_a_whole_factor_of_one_axis_merges_there_and_here() -> None:
    """The layout of HF's Kronecker product with a kernel of one axis, which is not that of the formula."""
    case = CASES["lokr-conv"]
    theirs, ours = theirs_of(case), ours_of(case)
    randomise(theirs)
    with torch.no_grad():
        state = hf.get_peft_model_state_dict(theirs)
        for key, tensor in ours.get_adapter_state_dict().items():
            tensor.copy_(state[key])
    expected = theirs.base_model.model.line.get_delta_weight("default")
    torch.testing.assert_close(ours.line.adapters.default.weight_delta(), expected, rtol=1e-6, atol=1e-7)

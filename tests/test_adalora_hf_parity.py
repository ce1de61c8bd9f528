"""AdaLoRA beside HF PEFT: the same steps prune the same ranks, and each reads the other's files.

Steps run in float64, so that a difference of rounding cannot decide which of two rows is pruned.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as hf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_core import PeftModel, drive, get_peft_model
from peft_lora import AdaLoraConfig, prune_ranks, rank_history

# HF PEFT takes the names in a file's `rank_pattern` for names of modules, finds none, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* tensor.s. have invalid shape"),  # by HF, for ranks of 0
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # by HF, for one of the two ways to store a weight
]


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class Net(nn.Module):
    """A layer of each kind that HF PEFT's AdaLoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.Linear(6, 10)
        self.turned = Conv1D(8, 10)
        self.down = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Output:
        hidden = self.conv(x).flatten(2).transpose(1, 2)
        logits = self.down(torch.tanh(self.turned(torch.tanh(self.up(hidden)))))
        return Output(logits.pow(2).mean() + logits.sin().sum() / 7, logits)


TARGETS = ["conv", "up", "turned", "down"]


def base() -> Net:
    torch.manual_seed(0)
    return Net().double()


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(**options: Any) -> tuple[Any, Any]:
    """(HF's, ours), with the same random tensors."""
    options = {"target_modules": TARGETS, "lora_alpha": 6, **options}
    theirs = hf.get_peft_model(base(), hf.AdaLoraConfig(**options))
    ours = get_peft_model(base(), AdaLoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mine = ours.get_adapter_state_dict()
        for key, tensor in hf.get_peft_model_state_dict(theirs).items():
            tensor.normal_(0, 0.3, generator=generator)
            mine[key].copy_(tensor)
    return theirs, ours


def factors(model: nn.Module) -> list[nn.Parameter]:
    """What trains; on float64 HF would also train the ranks that it divides by (`ranknum`), and not save them."""
    return [p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]


def pruned(tensors: dict[str, Tensor]) -> dict[str, list[bool]]:
    return {k.removeprefix("base_model.model."): (t == 0).flatten().tolist() for k, t in tensors.items() if "_E" in k}


SCHEDULES = {
    "defaults": {"init_r": 4, "target_r": 2, "total_step": 12},
    "phases": {"init_r": 4, "target_r": 2, "total_step": 14, "tinit": 3, "tfinal": 4},
    "every-third": {"init_r": 5, "target_r": 2, "total_step": 13, "tinit": 1, "tfinal": 2, "deltaT": 3},
    "betas": {"init_r": 4, "target_r": 1, "total_step": 12, "tfinal": 3, "beta1": 0.3, "beta2": 0.6},
    "no-regulariser": {"init_r": 4, "target_r": 2, "total_step": 10, "tfinal": 2, "orth_reg_weight": 0.0},
}


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_ranks_are_pruned_at_every_step(options: dict[str, Any], accumulation: int) -> None:
    """Masks, factors and losses after each step; the last step alone cuts, which HF does when it saves."""
    theirs, ours = both(**options)
    optimizers = [torch.optim.AdamW(factors(model), lr=0.02) for model in (theirs, ours)]
    drive(ours, optimizers[1])  # the whole of what a user writes
    for step in range(options["total_step"]):
        for batch in range(accumulation):
            x = images(step * accumulation + batch)
            losses = [theirs.base_model(x).loss, ours(x).loss]
            for loss in losses:
                loss.backward()
            # Of float64, through AdamW's divisions by small numbers.
            torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
        optimizers[0].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step < options["total_step"] - 1:
            expected = {k: v for k, v in theirs.named_parameters() if "lora_E" in k}
            expected = {k.removesuffix(".default"): v for k, v in expected.items()}
            mine = {k: v for k, v in ours.get_adapter_state_dict().items() if k.endswith("lora_E")}
            assert pruned(mine) == pruned(expected)
    end = ours.peft_config["default"].rank_pattern
    theirs_end = {
        key.removesuffix(".default"): tuple(rows) for key, rows in theirs.peft_config["default"].rank_pattern.items()
    }
    assert end == theirs_end
    assert sum(map(sum, end.values())) < options["init_r"] * len(TARGETS)
    # HF cuts by the same rows when it gives out the tensors.
    state, mine = hf.get_peft_model_state_dict(theirs), ours.get_adapter_state_dict()
    assert state.keys() == mine.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(mine[key].detach(), tensor.detach(), rtol=1e-9, atol=1e-12)
    assert rank_history(ours)[-1][1] == {key.removesuffix(".lora_E"): sum(rows) for key, rows in end.items()}


def trained(kind: str, **options: Any) -> Any:
    """One of the two libraries' models after a whole training."""
    options = {"init_r": 4, "target_r": 1, "total_step": 8, "tfinal": 2, **options}
    theirs, ours = both(**options)
    model = theirs if kind == "theirs" else ours
    optimizer = torch.optim.AdamW(factors(model), lr=0.02)
    if kind == "ours":
        drive(ours, optimizer)
    for step in range(8):
        model(images(step)).loss.backward()
        optimizer.step()
        if kind == "theirs":
            theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images(99)).logits


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
@pytest.mark.parametrize("training", [True, False], ids=["pruned", "whole"])
def test_theirs_loads_here(training: bool, merged: bool, tmp_path: Path) -> None:
    model = trained("theirs") if training else both(init_r=4, target_r=2, total_step=9)[0].eval()
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base().eval(), tmp_path)
    state, mine = load_file(tmp_path / "adapter_model.safetensors"), ours.get_adapter_state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[key], state[key]) for key in mine)
    if training:
        assert any(tensor.shape[0] < 4 for key, tensor in state.items() if key.endswith("lora_E"))
    expected = logits(model)
    if merged:
        ours.merge_adapter()
    assert_close(logits(ours), expected)
    assert not torch.allclose(expected, logits(base()))


@pytest.mark.parametrize("training", [True, False], ids=["pruned", "whole"])
def test_ours_loads_there(training: bool, tmp_path: Path) -> None:
    model = trained("ours") if training else both(init_r=4, target_r=2, total_step=9)[1].eval()
    model.save_pretrained(tmp_path)
    theirs = hf.PeftModel.from_pretrained(base(), tmp_path)
    assert_close(logits(theirs), logits(model))
    again = PeftModel.from_pretrained(base().eval(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert (pattern is not None) is training


def test_their_layer_without_ranks_loads_here(tmp_path: Path) -> None:
    """HF writes tensors without rows for a layer whose ranks are all pruned."""
    theirs, _ = both(init_r=2, target_r=1, total_step=6)
    optimizer = torch.optim.SGD(factors(theirs), lr=0.01)
    for step in range(6):
        theirs(images(step)).loss.backward()
        for name, parameter in theirs.named_parameters():
            if "down" in name and parameter.grad is not None:
                parameter.grad *= 1e-9
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base().eval(), tmp_path)
    assert ours.get_adapter_state_dict()["base_model.model.down.lora_A"].shape == (0, 8)
    assert_close(logits(ours), logits(theirs))
    ours.merge_adapter()
    assert_close(logits(ours), logits(theirs))


def test_an_unfinished_training_loads_there(tmp_path: Path) -> None:
    """Its file holds every row and the running averages, which HF passes over; HF's own would lose rows that grew."""
    _, ours = both(init_r=4, target_r=1, total_step=20, deltaT=4)
    optimizer = torch.optim.AdamW(factors(ours), lr=0.02)
    drive(ours, optimizer)
    for step in range(6):  # rows that step 4 pruned have grown again
        ours(images(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.eval().save_pretrained(tmp_path)
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names >= {"sensitivity_A", "uncertainty_E"}
    theirs = hf.PeftModel.from_pretrained(base(), tmp_path)
    assert_close(logits(theirs), logits(ours))
    ranks = prune_ranks(copy.deepcopy(ours))
    assert set(ranks.values()) == {4}


def test_the_same_tensors_and_defaults() -> None:
    fields = {f: getattr(hf.AdaLoraConfig(total_step=5), f) for f in AdaLoraConfig.model_fields}
    mine = AdaLoraConfig(total_step=5)
    assert {f: getattr(mine, f) for f in fields} == fields

"""New vectors made of others: HF PEFT's weighted sum, and the sum of deltas."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from peft_core import CombineError, get_peft_model, get_peft_model_state_dict
from peft_ia3 import IA3Config

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
WEIGHTS = [0.7, -0.4]


def adapted(*targets):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    for number, names in enumerate(targets):
        config = IA3Config(target_modules=names, feedforward_modules=[n for n in names if n == "2"])
        if number:
            model.add_adapter(f"a{number}", config)
        else:
            get_peft_model(model, config, "a0")
        for adapter in model.get_adapters(f"a{number}").values():
            nn.init.normal_(adapter.ia3_l)
    return model


def vectors(model, name):
    return {place: adapter.ia3_l.detach().flatten() for place, adapter in model.get_adapters(name).items()}


def test_the_sum_of_vectors_is_hfs():
    ours = adapted(["0", "2"], ["0", "2"])
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double(),
        peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
        "a0",
    )
    theirs.add_adapter("a1", peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]))
    for name in ("a0", "a1"):
        peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours, adapter_name=name), name)
    ours.add_weighted_adapter(["a0", "a1"], WEIGHTS, "sum")
    theirs.add_weighted_adapter(["a0", "a1"], WEIGHTS, "sum")
    expected = peft.get_peft_model_state_dict(theirs, adapter_name="sum")
    found = get_peft_model_state_dict(ours, adapter_name="sum")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)  # HF adds in float32


def test_linear_adds_deltas():
    model = adapted(["0", "2"], ["0"])
    model.add_weighted_adapter(["a0", "a1"], WEIGHTS, "sum", "linear")
    one, two, found = (vectors(model, name) for name in ("a0", "a1", "sum"))
    torch.testing.assert_close(found["0"], 1 + 0.7 * (one["0"] - 1) - 0.4 * (two["0"] - 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["2"], 1 + 0.7 * (one["2"] - 1), rtol=1e-12, atol=1e-12)
    # In weights, too: what is added to W is the sum of what they add.
    changes = []
    for name in ("a0", "a1", "sum"):
        merged = copy.deepcopy(model)
        before = merged.base_state_dict()["2.weight"].clone()
        merged.set_adapter(name)
        changes.append(merged.merge_and_unload()[2].weight - before)
    torch.testing.assert_close(changes[2], 0.7 * changes[0] - 0.4 * changes[1], rtol=1e-12, atol=1e-12)


def test_refusals():
    model = adapted(["0"], ["0"])
    model.add_adapter("input", IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    with pytest.raises(CombineError, match="the same side"):
        model.add_weighted_adapter(["a0", "input"], WEIGHTS, "sum")
    with pytest.raises(CombineError, match="cannot be combined by 'svd'"):
        model.add_weighted_adapter(["a0", "a1"], WEIGHTS, "sum", "svd")
    with pytest.raises(CombineError, match="without options"):
        model.add_weighted_adapter(["a0", "a1"], WEIGHTS, "sum", density=0.5)
    assert list(model.peft_config) == ["a0", "a1", "input"]

"""Merging: the same function, exact return, clear refusals, ties."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import GainConfig, MixConfig, SumConfig, digest, net, randomise

from peft_core import MergeError, RequestError, get_peft_model

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]])
UP_DOWN = SumConfig(target_modules=["up", "down"])

pytestmark = pytest.mark.usefixtures("toy_methods")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_equals_forward_and_unmerge_is_exact(dtype):
    model = net().to(dtype)
    original = copy.deepcopy(model.state_dict())
    get_peft_model(model, UP_DOWN)
    model.add_adapter("gain", GainConfig(target_modules=["up"]))
    randomise(model, seed=1)
    randomise(model, "gain", seed=2)
    model.set_adapter(["default", "gain"])
    before = model(IDS)
    for _ in range(3):
        model.merge_adapter()
        # One rounding of the weight to `dtype` against one of the sum; the layers' gain is below ten.
        torch.testing.assert_close(
            model(IDS), before, rtol=10 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps
        )
        model.unmerge_adapter()
        assert torch.equal(model(IDS), before)
    assert all(torch.equal(v, original[k]) for k, v in model.base_state_dict().items())


def test_merging_refuses_and_changes_nothing():
    model = get_peft_model(net(), MixConfig(target_modules=["up"]))
    before = digest(model)
    with pytest.raises(MergeError, match="layers.0.up.*cannot be expressed"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="cannot be expressed"):
        model.merge_and_unload()
    assert digest(model) == before
    model = get_peft_model(net(), UP_DOWN)
    randomise(model)
    with torch.no_grad():
        model.layers[1].down.of("default")[""].u[0] = torch.inf
    before = digest(model)
    with pytest.raises(MergeError, match=r"layers.1.down.weight.*not finite"):
        model.merge_adapter()
    assert digest(model) == before


def test_merged_state_is_guarded():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("other", GainConfig(target_modules=["up"]))
    model.merge_adapter()
    for action in (
        lambda: model.set_adapter("other"),
        lambda: model.merge_adapter(),
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("third", UP_DOWN),
    ):
        with pytest.raises(MergeError, match=r"unmerge_adapter\(\)"):
            action()
    with pytest.raises(RequestError, match="merged"), model.disable_adapter():
        model(IDS)
    model.unmerge_adapter()
    with pytest.raises(MergeError, match="no adapter is merged"):
        model.unmerge_adapter()


def test_merging_into_one_of_two_tied_weights_opens_the_tie_and_unmerging_closes_it():
    model = net()
    model.layers[1].up.weight = model.layers[0].up.weight
    tied = model.layers[0].up.weight
    get_peft_model(model, SumConfig(target_modules=["layers.0.up"]))
    randomise(model)
    before = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), before)
    assert model.layers[1].up.weight is tied and model.layers[0].up.weight is not tied
    model.unmerge_adapter()
    assert model.layers[0].up.weight is tied

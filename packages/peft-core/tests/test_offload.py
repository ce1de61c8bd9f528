"""Modules with a hook of accelerate, or with another `forward` of their own, adapted as if they had none."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import nn
from toys import GainConfig, ShiftConfig, SumConfig, net, randomise

from peft_core import MergeError, PeftModel, TargetError, get_peft_model

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CONFIGS = [
    SumConfig(target_modules=["up", "down"]),
    GainConfig(target_modules=["up"]),
    ShiftConfig(target_modules=["norm", "up", "embed"]),
    ShiftConfig(target_modules=["layers.1"]),  # a module of modules
]

pytestmark = pytest.mark.usefixtures("toy_methods")


def on_cpu(model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def in_place(model):
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def twice(model):
    on_cpu(model)
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
    return model


@pytest.mark.parametrize("how", [on_cpu, in_place, twice], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.peft_type} {c.target_modules[0]}")
def test_hooked_modules(how, config, tmp_path):
    plain = get_peft_model(net(), config)
    start = plain(IDS)
    randomise(plain)
    plain.save_pretrained(tmp_path)
    expected = plain(IDS)
    model = how(net())
    base = model(IDS)
    get_peft_model(model, config)
    assert torch.equal(model(IDS), start)
    randomise(model)
    for _ in range(2):  # what the first call fetched is gone, and fetched again
        assert torch.equal(model(IDS), expected)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model._peft.adapters["default"].parameters())
    if how is not in_place:
        assert all(p.is_meta for p in model.base_state_dict().values())
        with pytest.raises(MergeError, match="offloaded"):
            model.merge_adapter()
        assert torch.equal(model(IDS), expected)
    else:
        model.merge_adapter()
        torch.testing.assert_close(model(IDS), expected)
        model.unmerge_adapter()
    model.unload()
    assert torch.equal(model(IDS), base)
    assert torch.equal(PeftModel.from_pretrained(how(net()), tmp_path)(IDS), expected)


def test_a_copy_of_an_offloaded_module_is_refused():
    model = on_cpu(net())
    with pytest.raises(TargetError, match=r"classifier.*offloaded"):
        get_peft_model(model, SumConfig(target_modules=["up"], modules_to_save=["classifier"]))


def test_plans_and_meta_models_are_as_before():
    with torch.device("meta"):
        model = get_peft_model(net(), SumConfig(target_modules=["up"]))
    assert all(p.is_meta for p in model.parameters())


def test_a_forward_put_on_one_module_is_kept():
    """As kernels that replace a module's forward do."""

    def louder(self, x):
        return 2 * nn.functional.layer_norm(x, (8,), self.weight, self.bias)

    model = net()
    for layer in model.layers:
        layer.norm.forward = MethodType(louder, layer.norm)
    base = model(IDS)
    get_peft_model(model, ShiftConfig(target_modules=["norm"]))
    assert torch.equal(model(IDS), base)
    randomise(model)
    changed = model(IDS)
    assert not torch.allclose(changed, base, atol=1e-3)
    assert torch.equal(copy.deepcopy(model)(IDS), changed)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), changed)

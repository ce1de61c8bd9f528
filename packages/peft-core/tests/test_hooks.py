"""Every hook does what its page says, the page has every hook, and its code runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import GainAdapter, GainConfig, SumAdapter, SumConfig, digest, net, plugin, randomise

from peft_core import (
    BaseLayer,
    LinearLayer,
    PeftError,
    PeftModel,
    SiteRequest,
    TargetError,
    get_peft_model,
    get_peft_model_state_dict,
    hookimpl,
    register_method,
    unregister_method,
)
from peft_core.extensions import extensions
from peft_core.hookspecs import ExtensionSpecs, MethodSpecs

PAGE = Path(__file__).parents[3] / "docs" / "hooks.md"
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
HOOKS = {
    name: [argument for argument in inspect.signature(hook).parameters if argument != "self"]
    for specs in (MethodSpecs, ExtensionSpecs)
    for name, hook in vars(specs).items()
    if name.startswith("peft_")
}


@pytest.fixture
def method():
    """Register a method: one of the toys with further hooks."""
    names = []

    def make(config_class=SumConfig, adapter_class=SumAdapter, **hooks):
        built = vars(plugin(config_class, adapter_class)) | {n: staticmethod(hookimpl(h)) for n, h in hooks.items()}
        for name, hook in built.items():
            built[name] = hook.__func__ if isinstance(hook, staticmethod) else hook
        names.append(register_method(SimpleNamespace(**built), replace=True).name)
        return config_class

    yield make
    for name in set(names):
        unregister_method(name)


@pytest.fixture
def extension():
    def add(**hooks):
        extension = type("Extension", (), {n: staticmethod(hookimpl(h)) for n, h in hooks.items()})
        extensions.register(extension(), "for a test")

    yield add
    extensions.unregister("for a test")


def test_the_page_has_every_hook_with_its_exact_arguments():
    headings = dict(re.findall(r"^## (peft_\w+)\((.*)\)$", PAGE.read_text(), re.MULTILINE))
    assert {name: arguments.split(", ") if arguments else [] for name, arguments in headings.items()} == HOOKS


def test_every_hook_has_a_test_of_its_name():
    assert not [name for name in HOOKS if f"test_hook_{name}" not in globals()]


def test_the_pages_code_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    scope = {"model": net()}
    before = scope["model"](IDS)
    try:
        exec(code, scope)
        model = scope["model"]
        assert torch.equal(model(IDS), before)
        randomise(model)
        changed = model(IDS)
        assert not torch.allclose(changed, before, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(IDS), changed)
    finally:
        unregister_method("offset")


def test_hook_peft_config(method):
    config_class = method(GainConfig, GainAdapter)
    assert get_peft_model(net(), config_class(target_modules=["up"])).peft_config["default"].peft_type == "TOYGAIN"


def test_hook_peft_match(method):
    def peft_match(path, module):
        return path.startswith("layers.1") if isinstance(module, nn.Linear) else None

    config = method(peft_match=peft_match)(target_modules=["classifier"])
    assert list(get_peft_model(net(), config)._peft.sites) == ["layers.1.up", "layers.1.down"]


def test_hook_peft_resolve(method):
    def peft_resolve(config, matched):
        return config.resolve(scale=float(len(matched)))

    config = method(peft_resolve=peft_resolve)(target_modules=["up", "down"])
    model = get_peft_model(net(), config)
    assert config.scale == 1.0
    assert model.peft_config["default"].scale == model._peft.adapters["default"].adapters[0].scale == 4.0


def test_hook_peft_sites(method):
    def peft_sites(matched):
        return [SiteRequest("classifier", part="extra", key_prefix="extra.")] if matched else []

    model = get_peft_model(net(), method(peft_sites=peft_sites)(target_modules=["up"]))
    assert "base_model.model.classifier.extra.u" in get_peft_model_state_dict(model)


def test_hook_peft_prepare(method, tmp_path):
    def peft_prepare(model, name, layers, shared):
        if name == "unwanted":
            raise PeftError("not beside another one")
        shared.register_buffer("bank", torch.arange(float(len(layers))))

    class Banked(SumAdapter):
        def delta(self, x):
            return super().delta(x) + self.shared.bank.sum()

    config = method(adapter_class=Banked, peft_prepare=peft_prepare)(target_modules=["up"])
    model = get_peft_model(net(), config)
    assert not torch.allclose(model(IDS), net()(IDS))
    keys = [key for key in get_peft_model_state_dict(model) if key.endswith("bank")]
    assert keys == ["base_model.bank"]  # once, for two sites
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(IDS), model(IDS))
    before = digest(model)
    with pytest.raises(TargetError, match="not beside another one"):
        model.add_adapter("unwanted", config)
    assert digest(model) == before


def test_hook_peft_build(method, tmp_path):
    seen = []

    def peft_build(config, layer, tensors):
        seen.append(None if tensors is None else {key: tuple(t.shape) for key, t in tensors.items()})
        return SumAdapter(layer, config)

    config = method(peft_build=peft_build)(target_modules=["layers.0.up"])
    get_peft_model(net(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(net(), tmp_path)
    assert seen == [None, {"u": (16,), "v": (8,)}]


def test_hook_peft_merge(method):
    def peft_merge(adapter, params):
        return {**params, "weight": torch.zeros_like(params["weight"])}

    model = get_peft_model(net(), method(peft_merge=peft_merge)(target_modules=["layers.0.up"]))
    assert not model.merge_and_unload().layers[0].up.weight.any()


def test_hook_peft_state_key(method, tmp_path):
    def peft_state_key(key):
        return f"{key}.weight"

    model = get_peft_model(net(), method(peft_state_key=peft_state_key)(target_modules=["up"]))
    randomise(model)
    assert "base_model.model.layers.0.up.u.weight" in get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(IDS), model(IDS))


def test_hook_peft_layer(method, extension):
    class Coded(nn.Module):
        """A weight stored with its rows reversed."""

        def __init__(self, linear):
            super().__init__()
            self.code = nn.Parameter(linear.weight.detach().flip(0))

        def forward(self, x):
            return x @ self.code.flip(0).t()

    class CodedLayer(BaseLayer):
        kind = "linear"

        @property
        def in_features(self):
            return self.module.code.shape[1]

        @property
        def out_features(self):
            return self.module.code.shape[0]

        def params(self):
            return {"weight": self.module.code.flip(0)}

        def write(self, params):
            self.module.code = nn.Parameter(params["weight"].flip(0))

        def snapshot(self, names=None):
            return {"code": self.module.code}

        def call(self, params, x):
            return x @ params["weight"].t()

    extension(peft_layer=lambda path, module: CodedLayer(module, path) if isinstance(module, Coded) else None)
    model = nn.Sequential(Coded(nn.Linear(4, 6, bias=False)))
    x = torch.randn(3, 4)
    get_peft_model(model, method()(target_modules=["0"]))
    randomise(model)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    assert not isinstance(model[0]._layer, LinearLayer)


def test_hook_peft_architectures(method, extension):
    class RoleConfig(SumConfig):
        peft_type = "TOYROLE"
        default_roles = ("up",)

    extension(peft_architectures=lambda: {"a_model_of_mine": {"up": ["up"]}})
    model = net()
    model.config = SimpleNamespace(model_type="a_model_of_mine")
    get_peft_model(model, method(RoleConfig)())
    assert list(model._peft.sites) == ["layers.0.up", "layers.1.up"]


def test_hook_peft_checkpoint(method, extension, tmp_path):
    config = method()(target_modules=["up"])
    model = get_peft_model(net(), config)
    randomise(model)
    content = (config.to_dict(), get_peft_model_state_dict(model))
    extension(peft_checkpoint=lambda path: content if path.suffix == ".theirs" else None)
    (tmp_path / "adapter.theirs").touch()
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "adapter.theirs")(IDS), model(IDS))

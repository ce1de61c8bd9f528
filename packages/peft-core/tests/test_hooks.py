"""Every hook does what its page says, and has a page, whose code runs in tests/test_docs.py."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import GainAdapter, GainConfig, SumAdapter, SumConfig, digest, net, plugin, randomise

from peft_core import (
    AdapterNameError,
    AdapterState,
    BaseLayer,
    CheckpointError,
    CombineError,
    ConfigError,
    LinearLayer,
    MergeError,
    MethodContractError,
    PeftError,
    PeftModel,
    SiteRequest,
    Structure,
    TargetError,
    drive,
    get_peft_model,
    get_peft_model_state_dict,
    hookimpl,
    register_method,
    unregister_method,
)
from peft_core.extensions import extensions
from peft_core.hookspecs import ExtensionSpecs, MethodSpecs

DOCS = Path(__file__).parents[3] / "docs"
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


def test_every_hook_has_a_page_with_its_exact_arguments():
    found = {}
    for page in (DOCS / "hooks").glob("*.md"):
        name, arguments = re.fullmatch(r"# (peft_\w+)\((.*)\)", page.read_text().splitlines()[0]).groups()
        assert page.stem == name
        found[name] = arguments.split(", ") if arguments else []
    assert found == HOOKS


@pytest.mark.parametrize("name", HOOKS)
def test_the_page_of_a_hook_tells_each_argument(name):
    page = (DOCS / "hooks" / f"{name}.md").read_text()
    told = {a for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for a in re.findall(r"`(\w+)`", row)}
    assert told >= set(HOOKS[name])


def test_the_overview_has_every_hook_once():
    assert sorted(re.findall(r"^\| \[(peft_\w+)\]", (DOCS / "hooks.md").read_text(), re.MULTILINE)) == sorted(HOOKS)


def test_every_hook_has_a_test_of_its_name():
    assert not [name for name in HOOKS if f"test_hook_{name}" not in globals()]


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
    assert get_peft_model(net().eval(), config)._peft.adapters["default"].shared.training is False  # as the model is
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
    # Linear by its view, it is one of "all-linear".
    model.unload()
    get_peft_model(model, method()(target_modules="all-linear"))
    assert list(model.get_adapters()) == ["0"]


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


def test_hook_peft_export(method, extension, tmp_path):
    def peft_export(save_format, path, config, tensors):
        if save_format == "theirs":
            path.mkdir(parents=True)
            torch.save({"config": config, "tensors": dict(tensors)}, path / "adapter.theirs")
            return True
        return None

    model = get_peft_model(net(), method()(target_modules=["up"]))
    randomise(model)
    extension(peft_export=peft_export)
    model.save_pretrained(tmp_path / "out", save_format="theirs")
    written = torch.load(tmp_path / "out" / "adapter.theirs")
    assert written["config"]["peft_type"] == "TOYSUM"
    expected = get_peft_model_state_dict(model)
    assert written["tensors"].keys() == expected.keys()
    assert all(torch.equal(written["tensors"][key], expected[key]) for key in expected)
    with pytest.raises(CheckpointError, match="no installed extension writes the format 'ours'"):
        model.save_pretrained(tmp_path / "other", save_format="ours")
    assert not (tmp_path / "other").exists()


def test_hook_peft_calibrate(method):
    def peft_calibrate(config, layers, batches):
        """Points v along the mean input, and leaves out the layers whose input is small."""
        sums = {}
        for seen in batches.inputs(layers):
            for path, x in seen.items():
                sums[path] = sums.get(path, 0) + x.flatten(0, -2).sum(0)
        kept = [path for path in sums if path.endswith("up")]
        return AdapterState(config.resolve(target_modules=kept), {path: {"v": sums[path]} for path in kept})

    config_class = method(peft_calibrate=peft_calibrate)
    base = net().train()
    before, mode = digest(base), [module.training for module in base.modules()]
    seen = []
    base.layers[0].up.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model = get_peft_model(base, config_class(target_modules=["up", "down"]), calibration=[IDS, (IDS,)])
    assert list(model._peft.sites) == ["layers.0.up", "layers.1.up"]
    assert sorted(model.peft_config["default"].target_modules) == ["layers.0.up", "layers.1.up"]
    expected = (2 * seen[0]).flatten(0, -2).sum(0)
    torch.testing.assert_close(model.layers[0].up.of("default")[""].v.detach(), expected)
    assert not model.layers[0].up.of("default")[""].u.any()  # not given, so its usual start
    assert [module.training for module in model.unload().modules()] == mode
    assert digest(base) == before

    for path, message in (("layers.0.up", "has shape"), ("head", "does not select it")):
        tensors = {path: {"v": torch.zeros(3)}}
        config = method(peft_calibrate=lambda config, t=tensors: AdapterState(config, t))(target_modules=["up"])
        with pytest.raises(TargetError, match=message):
            get_peft_model(base, config, calibration=[])
    with pytest.raises(ConfigError, match="does not start from data"):
        get_peft_model(base, method()(target_modules=["up"]), calibration=[IDS])
    assert digest(base) == before


def test_calibration_is_never_misaligned(method):
    """Batches that can be read once are read once; what a batch and its inputs are is asked together."""
    seen = []

    def peft_calibrate(config, layers, batches):
        for batch in batches:
            found = batches.inputs_of(batch, layers)
            seen.append((batch, found["layers.0.up"].shape))
        if config.scale != 1:
            list(batches.inputs(layers))
        tensors = {"layers.0.up": {"v": torch.full((8,), float("nan"))}} if config.scale == 3 else {}
        return AdapterState(config, tensors)

    config_class = method(peft_calibrate=peft_calibrate)
    get_peft_model(net(), config_class(target_modules=["layers.0.up"]), calibration=(IDS[:n] for n in (1, 2)))
    assert [(len(batch), shape[0]) for batch, shape in seen] == [(1, 1), (2, 2)]
    again = config_class(target_modules=["layers.0.up"], scale=2.0)
    with pytest.raises(ConfigError, match="a second time, but they come from a generator"):
        get_peft_model(net(), again, calibration=(IDS for _ in range(2)))
    get_peft_model(net(), again, calibration=[IDS])
    with pytest.raises(TargetError, match="layers.0.up.v: the start holds numbers that are not finite"):
        get_peft_model(net(), config_class(target_modules=["layers.0.up"], scale=3.0), calibration=[IDS])


def test_hook_peft_combine(method):
    def peft_combine(sources, how, options):
        if how != "sum":
            return None
        sign = options.get("sign", 1)
        tensors = {
            path: {
                "u": sign * sum(source.weight * source.adapters[path].u for source in sources),
                "v": sources[0].adapters[path].v,
            }
            for path in sources[0].adapters
        }
        return AdapterState(sources[0].config, tensors)

    model = get_peft_model(net(), method(peft_combine=peft_combine)(target_modules=["up"]), "a")
    model.add_adapter("b", model.peft_config["a"])
    for seed, name in enumerate("ab"):
        randomise(model, name, seed=seed)
    before = digest(model)
    for refused, message in [
        ({"combination_type": "product"}, "cannot be combined by 'product'"),
        ({"adapters": [], "weights": []}, "needs adapters"),
        ({"weights": [1.0]}, "as many finite weights"),
        ({"weights": [1.0, float("nan")]}, "finite weights"),
    ]:
        given = {
            "adapters": ["a", "b"],
            "weights": [1.0, 2.0],
            "adapter_name": "c",
            "combination_type": "sum",
        } | refused
        with pytest.raises(CombineError, match=message):
            model.add_weighted_adapter(**given)
    assert digest(model) == before
    model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "c", "sum", sign=-1)
    site = model.layers[0].up
    torch.testing.assert_close(site.of("c")[""].u, -(site.of("a")[""].u + 2 * site.of("b")[""].u))
    assert model.active_adapters == ["a"] and not site.of("c")[""].u.requires_grad


def test_hook_peft_step(method):
    seen = []

    def peft_step(name, adapters, event, step, optimizer):
        gradients = {path: adapter.u.grad is not None for path, adapter in adapters.items()}
        seen.append((name, event, step, gradients))
        with torch.no_grad():
            if event == "before":  # a gradient transform, and then a projection of the parameters
                adapters["layers.0.up"].u.grad.zero_()
            else:
                adapters["layers.1.up"].u.clamp_(-1e-3, 1e-3)

    model = get_peft_model(net(), method(peft_step=peft_step)(target_modules=["up"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    bond = drive(model, optimizer, step=7)
    start = model.layers[0].up.of("default")[""].u.detach().clone()
    for _ in range(2):  # two batches accumulated are one event
        model(IDS).square().sum().backward()
    optimizer.step()
    there = {"layers.0.up": True, "layers.1.up": True}
    assert seen == [("default", "before", 7, there), ("default", "after", 7, there)]
    assert torch.equal(model.layers[0].up.of("default")[""].u, start)
    assert 0 < model.layers[1].up.of("default")[""].u.abs().max() <= 1e-3
    optimizer.step()
    assert seen[-1][2] == 8 and bond.step == 9
    drive(model, optimizer)  # once more: not twice the events
    optimizer.step()
    assert [entry[1:3] for entry in seen[4:]] == [("before", 0), ("after", 0)]
    model.set_adapter("default", inference_mode=True)
    with model.disable_adapter():
        optimizer.step()
    drive(model, optimizer).remove()
    count = len(seen)
    optimizer.step()
    assert len(seen) == count
    with pytest.raises(PeftError, match="needs a torch.optim.Optimizer"):
        drive(model, object())


def test_a_step_may_change_what_files_say(method):
    def peft_step(config, event, step):
        return config.resolve(scale=config.scale + step) if event == "after" else None

    model = get_peft_model(net(), method(peft_step=peft_step)(target_modules=["up"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drive(model, optimizer, step=2)
    for _ in range(2):
        optimizer.step()
    assert model.peft_config["default"].scale == 1.0 + 2 + 3


def test_hook_peft_param_groups(method):
    def peft_param_groups(parameters, lr):
        up = [p for name, p in parameters.items() if name.endswith(".u")]
        rest = [p for name, p in parameters.items() if not name.endswith(".u")]
        return [{"params": up, "lr": 16 * lr}, {"params": rest}]

    model = get_peft_model(net(), method(peft_param_groups=peft_param_groups)(target_modules=["up"]))
    model.classifier.weight.requires_grad_(True)  # the user's own wish
    groups = model.parameter_groups(0.1, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1.6, 0.5, 2),
        (0.1, 0.5, 2),
        (0.1, 0.5, 1),
    ]
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    torch.optim.AdamW(groups)

    plain = get_peft_model(net(), method()(target_modules=["up"]))
    assert [len(group["params"]) for group in plain.parameter_groups(0.1)] == [4]
    for wrong in (
        lambda parameters: [{"params": list(parameters.values())[1:]}],
        lambda parameters: [{"params": list(parameters.values())}, {"params": list(parameters.values())[:1]}],
        lambda parameters: [{"params": [*parameters.values(), nn.Parameter(torch.zeros(1))]}],
    ):
        model = get_peft_model(net(), method(peft_param_groups=wrong)(target_modules=["up"]))
        with pytest.raises(MethodContractError, match="do not hold each tensor of adapter 'default' once"):
            model.parameter_groups(0.1)


def test_hook_peft_structure(method, tmp_path):
    def peft_structure(config, model):
        """Runs the first layer twice: the copy shares its weights and gets adapters of its own."""
        first, second = model.layers[0], model.layers[1]
        twin = copy.copy(first)
        twin._modules = {name: copy.copy(child) for name, child in first._modules.items()}
        return Structure({"layers": nn.ModuleList([first, twin, second])}, config={"layers": 3})

    def model_with_config():
        model = net()
        model.config = SimpleNamespace(layers=2)
        return model

    config = method(peft_structure=peft_structure)(target_modules=["up"])
    base = model_with_config()
    expected, before, flags = base(IDS), digest(base), {n: p.requires_grad for n, p in base.named_parameters()}
    layers = base.layers
    model = get_peft_model(base, config)
    assert list(model._peft.sites) == ["layers.0.up", "layers.1.up", "layers.2.up"] and model.config.layers == 3
    assert model.layers[0].down.weight is model.layers[1].down.weight
    randomise(model)
    three = model(IDS)
    assert not torch.allclose(three, expected, atol=1e-3)

    model.save_pretrained(tmp_path)
    again = model_with_config()
    PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(again(IDS), three) and again.config.layers == 3

    plain = method()(target_modules=["down"])
    with pytest.raises(MergeError, match="change of the model's build"):
        model.merge_and_unload()
    model.add_adapter("other", plain)
    with pytest.raises(AdapterNameError, match="delete the others first"):
        model.delete_adapter("default")
    assert torch.equal(model(IDS), three)
    model.unload()
    assert base.layers is layers and base.config.layers == 2 and torch.equal(base(IDS), expected)
    assert digest(base) == before and {n: p.requires_grad for n, p in base.named_parameters()} == flags

    get_peft_model(base, plain)
    before = digest(base)
    with pytest.raises(TargetError, match="add it first"):
        base.add_adapter("late", method(peft_structure=peft_structure)(target_modules=["up"]))
    nowhere = method(peft_structure=lambda: Structure({"nowhere": nn.Linear(1, 1)}))
    with pytest.raises(TargetError, match="does not have: .'nowhere'"):
        get_peft_model(net(), nowhere(target_modules=["up"]))
    assert digest(base) == before

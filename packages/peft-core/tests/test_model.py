"""Adapters on a model: presence, activity, trainability, rows, copies, merging, leaving."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from toys import GainConfig, Net, ShiftConfig, SumConfig, digest, net, randomise

from peft_core import (
    Adapter,
    AdapterNameError,
    AdapterNotFoundError,
    PeftError,
    PeftModel,
    TargetError,
    base_modules,
    get_peft_model,
    plan,
)

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]])
UP_DOWN = SumConfig(target_modules=["up", "down"])

pytestmark = pytest.mark.usefixtures("toy_methods")


def test_the_model_is_the_users_own():
    model = net()
    adapted = get_peft_model(model, UP_DOWN)
    assert adapted is model and isinstance(model, Net) and isinstance(model, PeftModel)
    assert type(model).__name__ == "Net" and type(model).__module__ == Net.__module__
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in model.named_parameters() if ".adapters." in n
    ]


def test_start_equals_base_and_disabled_equals_base_bit_for_bit():
    model = net()
    before = model(IDS)
    get_peft_model(model, UP_DOWN)
    # The adapted layers see their rows flattened; the same kernel then runs on the same numbers.
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-6)
    randomise(model)
    assert not torch.allclose(model(IDS), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(IDS), before)
        with model.disable_adapter():
            assert torch.equal(model(IDS), before)
        assert torch.equal(model(IDS), before)
    assert not torch.allclose(model(IDS), before, atol=1e-3)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert not torch.allclose(model(IDS), before, atol=1e-3)


def test_several_adapters_switch_stack_and_go():
    model = get_peft_model(net(), UP_DOWN)
    randomise(model, seed=1)
    first = model(IDS)
    model.add_adapter("other", GainConfig(target_modules=["up"]))
    randomise(model, "other", seed=2)
    assert model.active_adapters == ["default"] and torch.equal(model(IDS), first)
    model.set_adapter("other")
    second = model(IDS)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter(["default", "other"])
    both = model(IDS)
    up = model.layers[0].up
    x = torch.randn(5, 8)
    chain = model._peft.sites["layers.0.up"]
    a, b = chain.of("default")[""], chain.of("other")[""]
    expected = (up.base_layer(x) + (x @ a.v)[:, None] * a.u) * b.gain
    torch.testing.assert_close(up(x), expected)  # innermost first: the sum, then the gain
    assert not torch.allclose(both, first, atol=1e-3) and not torch.allclose(both, second, atol=1e-3)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and torch.equal(model(IDS), second)
    assert list(model._peft.sites) == ["layers.0.up", "layers.1.up"]
    model.delete_adapter("other")
    assert not model._peft.sites and torch.equal(model(IDS), net()(IDS))


def test_trainability_follows_activity_but_is_never_lost():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("frozen", SumConfig(target_modules=["up"], inference_mode=True))
    model.add_adapter("third", GainConfig(target_modules=["up"]))
    flags = lambda name: {p.requires_grad for p in model._peft.adapters[name].parameters()}  # noqa: E731
    assert flags("default") == {True} and flags("frozen") == {False} and flags("third") == {False}
    model.set_adapter(["third", "frozen"])
    assert flags("default") == {False} and flags("frozen") == {False} and flags("third") == {True}
    model.set_adapter("default")
    assert flags("default") == {True} and flags("third") == {False}
    model.set_adapter("default", inference_mode=True)
    assert flags("default") == {False}
    model.set_requires_grad("frozen")
    model.set_adapter("frozen")
    assert flags("frozen") == {True}


def test_unload_gives_back_the_base_as_it_came():
    model = net()
    model.embed.weight.requires_grad_(False)
    model.layers[0].eval()
    before = digest(model)
    get_peft_model(model, SumConfig(target_modules=["up"], modules_to_save=["classifier"]))
    assert model.unload() is model
    assert digest(model) == before and not isinstance(model, PeftModel)


def test_modules_to_save_trains_a_copy():
    model = net()
    base = model(IDS)
    get_peft_model(model, SumConfig(target_modules=["up"], modules_to_save=["classifier"]))
    original = model.classifier.base_layer.weight.clone()
    model(IDS).sum().backward()
    copy_ = model.classifier.of("default")[""].modules_to_save
    assert copy_.weight.grad is not None and model.classifier.base_layer.weight.grad is None
    with torch.no_grad():
        copy_.weight.add_(1.0)
    changed = model(IDS)
    with model.disable_adapter():
        assert torch.equal(model(IDS), base)
    assert torch.equal(model.classifier.base_layer.weight, original)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS), changed)
    assert torch.equal(merged.classifier.weight, original + 1)


def test_copies_are_independent():
    model = get_peft_model(net(), SumConfig(target_modules=["up"], modules_to_save=["classifier"]))
    randomise(model)
    before = model(IDS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert isinstance(twin, PeftModel) and isinstance(twin, Net) and type(twin) is type(model)
        assert torch.equal(twin(IDS), before)
        randomise(twin, seed=9)
        twin.disable_adapter_layers()
        assert torch.equal(model(IDS), before)
    twins[0].unload()
    assert torch.equal(model(IDS), before)


def test_names_are_checked_and_compared_whole():
    model = get_peft_model(net(), UP_DOWN)
    for bad in ("", "a/b", "..", "a\\b", "__base__", "a:b", 3):
        with pytest.raises(AdapterNameError):
            model.add_adapter(bad, UP_DOWN)
    with pytest.raises(AdapterNameError, match="'default' is on the model already"):
        model.add_adapter("default", UP_DOWN)
    with pytest.raises(AdapterNameError, match="already"):
        get_peft_model(model, UP_DOWN)
    for odd in ("up", "1", "layers", "train", "adapters", "default2"):
        model.add_adapter(odd, UP_DOWN)
    model.delete_adapter("default2")
    assert "default" in model.peft_config
    with pytest.raises(AdapterNotFoundError, match="it has"):
        model.set_adapter("nobody")
    with pytest.raises(AdapterNameError, match="twice"):
        model.set_adapter(["up", "up"])


def test_wrong_objects_are_named():
    with pytest.raises(PeftError, match=r"torch\.nn\.Module"):
        get_peft_model(3, UP_DOWN)
    with pytest.raises(PeftError, match="change the import line"):
        get_peft_model(net(), {"r": 8})


def test_a_model_around_an_adapted_one_is_refused():
    outer = nn.Sequential(get_peft_model(net(), UP_DOWN))
    with pytest.raises(TargetError, match=r"0\.layers\.0\.up carries adapters of a model inside"):
        get_peft_model(outer, UP_DOWN)
    assert not isinstance(outer, PeftModel)


def test_problems_come_all_at_once_and_before_anything_changes():
    model = net()
    before = digest(model)
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, SumConfig(target_modules=["up", "dwon", "embed"], modules_to_save=["clasifier"]))
    assert "dwon" in str(caught.value) and "clasifier" in str(caught.value)
    with pytest.raises(TargetError, match="embed.*only linear layers"):
        get_peft_model(model, SumConfig(target_modules=["up", "embed"]))
    assert digest(model) == before
    shown = plan(model, SumConfig(target_modules=["up", "dwon"]))
    assert shown.problems and "dwon" in str(shown)


def test_plan_shows_the_outcome_on_meta_models_too():
    config = SumConfig(target_modules=["up", "down"], modules_to_save=["classifier"])
    model = net()
    before = digest(model)
    shown = plan(model, config)
    assert digest(model) == before and not shown.problems
    get_peft_model(model, config)
    trainable, total = model.get_nb_trainable_parameters()
    assert shown.trainable == trainable and shown.base + shown.trainable == total
    with torch.device("meta"):
        ghost = Net()
    assert plan(ghost, config).trainable == trainable
    assert "layers.*.up (2 times)" in str(shown) and "SavedModule" in str(shown)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the encoder's own use of them
@pytest.mark.parametrize("target", ["linear1", "self_attn"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_adapter_inside_a_fused_encoder_layer_acts(target, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    kept = ~mask[..., None]  # what comes out at padding is anything
    options = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        fused = model(x, **options)
        get_peft_model(model, ShiftConfig(target_modules=[target]))
        torch.testing.assert_close(model(x, **options) * kept, fused * kept, rtol=1e-5, atol=1e-5)
        randomise(model)
        changed = model(x, **options)
        assert not torch.allclose(changed * kept, fused * kept, atol=1e-3)
        merged = model.merge_and_unload()
        assert merged.use_nested_tensor
        torch.testing.assert_close(merged(x, **options) * kept, changed * kept, rtol=1e-4, atol=1e-5)


def test_a_module_registered_twice_is_one_site():
    model = net()
    model.layers[1].up = model.layers[0].up
    get_peft_model(model, SumConfig(target_modules=["up"]))
    assert model.layers[0].up is model.layers[1].up and list(model._peft.sites) == ["layers.0.up"]
    randomise(model)
    before = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), before)
    model.unload()
    assert model.layers[0].up is model.layers[1].up and type(model.layers[0].up) is nn.Linear


def test_sites_look_like_their_base_layer():
    model = get_peft_model(net(), UP_DOWN)
    site = model.layers[0].up
    assert site.in_features == 8 and site.weight is site.base_layer.weight
    site.weight = nn.Parameter(torch.zeros(16, 8))
    assert "weight" not in site._parameters and torch.equal(site.base_layer.weight, torch.zeros(16, 8))
    with pytest.raises(AttributeError, match="no_such"):
        _ = site.no_such
    model.eval()
    assert not model.layers[0].up.of("default")[""].training
    assert set(model.base_state_dict()) == set(net().state_dict())


@pytest.mark.parametrize(
    "config", [UP_DOWN, GainConfig(target_modules=["up"]), ShiftConfig(target_modules=["norm", "up"])]
)
def test_compile_is_one_graph(config):
    model = get_peft_model(net(), config)
    randomise(model)
    eager = model(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), eager)
    compiled(IDS).sum().backward()
    assert all(p.grad is not None for p in model._peft.adapters["default"].parameters())
    with model.disable_adapter():
        torch.testing.assert_close(compiled(IDS), model(IDS))
    torch.testing.assert_close(compiled(IDS), eager)


def test_status_reports():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("gain", GainConfig(target_modules=["up"]))
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert layers["layers.0.up"].available_adapters == ["default", "gain"]
    assert layers["layers.0.up"].requires_grad == {"default": True, "gain": False}
    assert layers["layers.0.down"].active_adapters == ["default"]
    whole = model.get_model_status()
    assert whole.base_model_type == "Net" and whole.peft_types == {"default": "TOYSUM", "gain": "TOYGAIN"}
    assert whole.enabled and whole.num_adapter_layers == 4 and whole.available_adapters == ["default", "gain"]
    model.set_adapter(["default", "gain"])
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default", "gain"]


def test_trainable_line(capsys):
    model = get_peft_model(net(), UP_DOWN)
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * (8 + 16) * 2
    share = f"{100 * trainable / total:.4f}"
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}\n"
    )


def test_the_base_and_the_adapters_by_path():
    plain = net()
    paths = [path for path, _ in plain.named_modules()]
    model = get_peft_model(plain, SumConfig(target_modules=["up", "layers.1.down"]))
    model.add_adapter("other", SumConfig(target_modules=["classifier"]))
    found = base_modules(model)
    assert list(found) == paths
    assert all(type(module).__name__ != "Site" for module in found.values())
    adapters = model.get_adapters()
    assert list(adapters) == ["layers.0.up", "layers.1.up", "layers.1.down"]
    assert adapters["layers.0.up"] is model.layers[0].up.of("default")[""]
    assert list(model.get_adapters("other")) == ["classifier"]
    with pytest.raises(AdapterNotFoundError):
        model.get_adapters("nobody")


def test_shared_is_not_there_while_an_adapter_is_built():
    adapter = get_peft_model(net(), UP_DOWN).get_adapters()["layers.0.up"]
    bare = type(adapter)(adapter.layer, UP_DOWN)
    with pytest.raises(AttributeError, match="use the argument `shared` of peft_build"):
        _ = bare.shared.table
    with pytest.raises(AttributeError, match="has no attribute 'shraed'"):
        _ = bare.shraed
    assert "__getattr__" not in vars(Adapter)  # reading a tensor of an adapter costs no call of the core's
    assert adapter.layer.buffer(2, 3).shape == (2, 3)

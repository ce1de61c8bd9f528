"""Adapters on a model: presence, activity, trainability, rows, copies, merging, leaving."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from toys import GainConfig, MixConfig, Net, RollConfig, SumConfig, net, randomise, toys

from peft_core import (
    AdapterNameError,
    AdapterNotFoundError,
    MergeError,
    PeftError,
    PeftModel,
    RequestError,
    TargetError,
    get_peft_model,
    plan,
)

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]])
UP_DOWN = SumConfig(target_modules=["up", "down"])


@pytest.fixture(autouse=True)
def _toys():
    with toys():
        yield


def digest(model: nn.Module) -> dict:
    """Everything a failed operation must leave alone."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "tensors": [
            (name, id(tensor), tensor._version, tensor.requires_grad, tensor.data_ptr())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        ],
        "modes": [module.training for module in model.modules()],
        "class": type(model),
        "state": (
            (model._peft.active, model._peft.enabled, model._peft.routing.merged, sorted(model._peft.adapters))
            if isinstance(model, PeftModel)
            else None
        ),
    }


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
    copy_ = model.classifier.of("default")[""].module
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
        torch.testing.assert_close(model(IDS), before, rtol=10 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)
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


def test_rows_equal_separate_runs():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("gain", GainConfig(target_modules=["up", "classifier"]))
    model.add_adapter("shift", RollConfig(target_modules=["norm"]))
    for seed, name in enumerate(["default", "gain", "shift"]):
        randomise(model, name, seed=seed)
    names = ["gain", "__base__", "default", "shift"]
    mixed = model(IDS, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(IDS[row : row + 1])
        else:
            model.set_adapter(name)
            alone = model(IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    alone = model(IDS)
    assert torch.equal(model(IDS), alone)  # the request left nothing behind
    torch.testing.assert_close(model(IDS, adapter_names=["default"] * 4), alone, rtol=0, atol=0)
    # Two rows of the batch per name, as under beam search.
    torch.testing.assert_close(model(IDS, adapter_names=["default", "gain"])[:2], alone[:2], rtol=1e-5, atol=1e-6)


def test_rows_are_refused_where_they_cannot_be_right():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("mix", MixConfig(target_modules=["up"]))
    before = model(IDS)
    with pytest.raises(RequestError, match="3 entries.*4 rows"):
        model(IDS, adapter_names=["default"] * 3)
    with pytest.raises(AdapterNotFoundError, match="'defualt'.*Did you mean 'default'"):
        model(IDS, adapter_names=["defualt"] * 4)
    with pytest.raises(RequestError, match="mixes the rows"):
        model(IDS, adapter_names=["default", "mix", "mix", "mix"])
    assert torch.equal(model(IDS), before)


def test_rows_get_gradients_of_their_own_adapter():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("b", UP_DOWN)
    model.set_adapter(["default", "b"])
    randomise(model, "default", seed=1)
    randomise(model, "b", seed=2)
    model(IDS, adapter_names=["default", "default", "b", "b"])[2:].sum().backward()
    grads = {name: [p.grad for p in model._peft.adapters[name].parameters()] for name in ("default", "b")}
    assert all(g is not None and g.abs().sum() > 0 for g in grads["b"])
    assert all(g is None or g.abs().sum() == 0 for g in grads["default"])


@pytest.mark.parametrize("kind", ["reentrant", "saved"])
def test_activation_checkpointing_recomputes_under_the_forwards_request(kind):
    def grads(checkpoint):
        model = get_peft_model(net(checkpoint=checkpoint), UP_DOWN)
        model.add_adapter("b", GainConfig(target_modules=["up"]))
        model.set_adapter(["default", "b"])
        randomise(model, "default", seed=1)
        randomise(model, "b", seed=2)
        model.embed.weight.requires_grad_(True)  # a reentrant checkpoint needs an input with a gradient
        loss = model(IDS, adapter_names=["b", "default", "__base__", "b"]).square().sum()
        with torch.no_grad():
            model(IDS)  # an evaluation between forward and backward changes nothing
        with model.disable_adapter():
            loss.backward()
        return [p.grad for n in ("default", "b") for p in model._peft.adapters[n].parameters()]

    for plain, recomputed in zip(grads(None), grads(kind), strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


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


@pytest.mark.parametrize("operation", ["get", "add", "delete", "merge", "unmerge", "set"])
def test_a_failure_at_any_call_leaves_everything_as_it_was(operation):
    """An exception at the 1st, 2nd, 3rd ... call the library makes, until the operation completes."""
    def fresh():
        model = net()
        if operation != "get":
            get_peft_model(model, UP_DOWN)
            randomise(model)
            if operation == "unmerge":
                model.merge_adapter()
        return model

    def act(model):
        if operation == "get":
            get_peft_model(model, UP_DOWN)
        elif operation == "add":
            model.add_adapter("b", SumConfig(target_modules=["up", "classifier"]))
        elif operation == "delete":
            model.delete_adapter("default")
        elif operation == "merge":
            model.merge_adapter()
        elif operation == "unmerge":
            model.unmerge_adapter()
        else:
            model.set_adapter([])

    completed = False
    for point in range(1, 4000):
        model = fresh()
        before, count = digest(model), 0

        def trace(frame, event, arg, point=point):
            nonlocal count
            if event == "call" and "peft_core" in frame.f_code.co_filename:
                if undoing(frame):
                    return None
                count += 1
                if count == point:
                    raise KeyboardInterrupt
            return None

        def undoing(frame):
            while frame is not None:
                if frame.f_code.co_name == "__exit__" and "transaction.py" in frame.f_code.co_filename:
                    return True
                frame = frame.f_back
            return False

        try:
            sys.settrace(trace)
            try:
                act(model)
            finally:
                sys.settrace(None)
            completed = True
            break
        except KeyboardInterrupt:
            assert digest(model) == before, f"failure at call {point} of {operation} left a trace"
    assert completed
    act(fresh())


def test_concurrent_calls_never_see_each_others_adapters():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("b", GainConfig(target_modules=["up"]))
    randomise(model, "default", seed=1)
    randomise(model, "b", seed=2)
    expected = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        expected[name] = model(IDS).detach()
    with model.disable_adapter():
        expected["__base__"] = model(IDS).detach()
    wrong: list[str] = []

    def serve(name):
        for _ in range(100):
            with torch.no_grad():
                if not torch.allclose(model(IDS, adapter_names=[name] * 4), expected[name], atol=1e-6):
                    wrong.append(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve, args=(name,)) for name in expected for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_an_adapter_inside_a_fused_encoder_layer_acts():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        fused = model(x)
        get_peft_model(model, SumConfig(target_modules=["linear1"]))
        torch.testing.assert_close(model(x), fused, rtol=1e-5, atol=1e-5)
        randomise(model)
        assert not torch.allclose(model(x), fused, atol=1e-3)
        changed = model(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), changed, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("config", [UP_DOWN, GainConfig(target_modules=["up"]), RollConfig(target_modules=["norm", "up"])])
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
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    )

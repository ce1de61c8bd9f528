"""What adapters bring along goes with them, is copied and saved with them, and is nobody else's."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from feature_toys import ALL, BATCHES, BUILT, AllConfig, Net, X, Y, adapted, built, feature_toys, gated, net, plain, two
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import GainConfig, SumAdapter, SumConfig, plugin, randomise

from peft_core import (
    Adapter,
    AdapterConfig,
    AdapterNameError,
    Call,
    DeltaAdapter,
    PeftModel,
    RequestError,
    SiteRequest,
    Structure,
    TargetedConfig,
    TargetError,
    get_peft_model,
    hookimpl,
    register_method,
    unregister_method,
)
from peft_core.overrides import extra_positions
from peft_core.routing import Request, remembers
from peft_core.site import Site
from peft_core.training import drive
from peft_core.transaction import Undo

MAKERS = pytest.mark.parametrize("make", [adapted, built, gated, two])


class PlusConfig(AdapterConfig):
    """Adds a number to what the whole model gives."""

    peft_type: ClassVar[str] = "TOYPLUS"


class PlusAdapter(DeltaAdapter):
    def __init__(self, layer: Any, config: PlusConfig) -> None:
        super().__init__(layer)
        self.number = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.number)

    def delta(self, x: Tensor) -> Tensor:
        return self.number.expand_as(x)


class OneBlockConfig(TargetedConfig):
    """Puts one block at the places of two."""

    peft_type: ClassVar[str] = "TOYONEBLOCK"
    scale: float = 1.0


class TaskConfig(TargetedConfig):
    """A gain for each task, and nothing around the model."""

    peft_type: ClassVar[str] = "TOYTASKS"
    request_arguments: ClassVar[tuple[str, ...]] = ("task",)


class TaskAdapter(Adapter):
    def __init__(self, layer: Any, config: TaskConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(2, 1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        task = base.call.arguments["task"]
        return base(x) * self.gain[0 if isinstance(task, str) else base.call.rows("task", len(x))]

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * self.gain[0] for name, value in params.items()}


@hookimpl
def peft_structure(model: Any) -> Structure:
    block = copy.deepcopy(model.layers[0])
    return Structure({"layers.0": block, "layers.1": block})


@pytest.fixture(scope="module", autouse=True)
def _methods() -> Iterator[None]:
    made = [plugin(PlusConfig, PlusAdapter), plugin(OneBlockConfig, SumAdapter), plugin(TaskConfig, TaskAdapter)]
    made[0].peft_sites = hookimpl(lambda config: [SiteRequest("")])
    made[1].peft_structure = peft_structure
    with feature_toys():
        names = [register_method(one, replace=True).name for one in made]
        yield
        for name in names:
            unregister_method(name)


# -- the base comes back -----------------------------------------------------------------------------------------


@MAKERS
def test_unload_gives_back_the_base(make: Any) -> None:
    base = net()
    model = make().train()
    model(X, labels=Y, task_ids=0)["loss"].backward()
    found = model.unload()
    assert found is model and type(found) is Net
    assert found.__dict__.keys() == base.__dict__.keys() and vars(found.config) == vars(base.config)
    assert str(inspect.signature(found.forward)) == str(inspect.signature(base.forward))
    state = base.state_dict()
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())


@MAKERS
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_stand_alone(make: Any, copied: Any) -> None:
    model = make().eval()
    wanted = model(X, task_ids=1)["logits"]
    other = copied(model)
    assert torch.equal(other(X, task_ids=1)["logits"], wanted)
    assert type(other.unload()) is Net
    assert torch.equal(model(X, task_ids=1)["logits"], wanted)


def test_a_module_at_two_places_makes_room_at_both() -> None:
    model = net()
    before = {name: id(module) for name, module in model.named_modules()}
    get_peft_model(model, OneBlockConfig(target_modules=["up"]))
    assert model.layers[0] is model.layers[1]
    model.unload()
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("make", [adapted, built])
def test_files_bring_everything_back(make: Any, tmp_path: Any) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(X, task_ids=1)["logits"], model(X, task_ids=1)["logits"])


# -- nothing is kept ---------------------------------------------------------------------------------------------


@MAKERS
def test_a_trained_model_is_let_go(make: Any) -> None:
    model = make().train()
    model(X, labels=Y, task_ids=0)["loss"].backward()
    held = weakref.ref(model), weakref.ref(model._peft)
    del model
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_a_call_is_let_go_with_its_output(monkeypatch: Any) -> None:
    model = adapted().train()
    made = []
    describe = model._describe

    def noted(*args: Any) -> Call:
        call = describe(*args)
        made.append(weakref.ref(call))
        return call

    monkeypatch.setattr(model, "_describe", noted)
    out = model(X, labels=Y, task_ids=0)
    assert made[0]() is not None  # a recompute would ask for it
    gc.collect()
    gc.disable()
    try:
        out["loss"].backward()
        del out
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_driven_optimizer_is_let_go() -> None:
    """Although the function that tells the step's number refers to it, as `Trainer`'s does."""

    def driven() -> tuple[Any, Any]:
        model = adapted()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        drive(model, optimizer, step=lambda: len(optimizer.param_groups))
        return weakref.ref(model), weakref.ref(optimizer)

    held = driven()
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_requests_of_the_past_do_not_pile_up() -> None:
    model = plain()
    for size in range(2, 12):
        model(X[:1].repeat(2 * size, 1), adapter_names=["a"] * size + ["b"] * size)
    assert len(model._peft.routing._recent) <= 2


# -- adapters made of others -------------------------------------------------------------------------------------


def trained(model: Any) -> set[str]:
    return {name for name, record in model._peft.adapters.items() if all(p.requires_grad for p in record.parameters())}


def test_what_trains_along_with_an_adapter_stops_with_it() -> None:
    model = gated()
    assert trained(model) == {"a", "b", "gate"}
    model.set_requires_grad("gate", False)
    assert trained(model) == set()
    model.set_requires_grad("gate")
    assert trained(model) == {"a", "b", "gate"}
    model.delete_adapter("gate")
    assert trained(model) == set()


@pytest.mark.parametrize("active", [["a", "gate"], ["gate", "a"]])
def test_what_is_active_by_itself_goes_on_training(active: list[str]) -> None:
    model = gated()
    model.set_adapter(active)
    model.set_requires_grad("gate", False)
    assert trained(model) == {"a"}
    model.set_adapter("b")
    model.set_adapter(active)
    assert trained(model) == {"a"}
    model.set_requires_grad("gate")
    model.delete_adapter("gate")
    assert trained(model) == {"a"}


def test_no_adapter_is_made_of_itself(tmp_path: Any) -> None:
    model = gated()
    model.save_pretrained(tmp_path, selected_adapters=["gate"])
    with pytest.raises(AdapterNameError, match="'a' would be made of .*'a'.*, and so of itself"):
        model.load_adapter(tmp_path / "gate", "a", replace=True)
    config = model.peft_config["gate"].resolve(others=("gate",))
    with pytest.raises(AdapterNameError, match="'gate' would be made of .*'gate'"):
        model.load_adapter(tmp_path / "gate", "gate", replace=True, config=config)
    assert torch.isfinite(model(X, task_ids=0)["logits"]).all()


def test_names_are_looked_at_before_adapters_are_combined(monkeypatch: Any) -> None:
    model = two()
    monkeypatch.setattr("peft_core.combining.hook_results.call", lambda *args, **kwargs: pytest.fail("combined"))
    with pytest.raises(AdapterNameError, match="'other' is on the model already"):
        model.add_weighted_adapter(["default"], [1], "other", "mean")


# -- calls -------------------------------------------------------------------------------------------------------


def test_something_may_be_added_to_what_the_model_gives() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    wanted = model(X)
    get_peft_model(model, PlusConfig())
    torch.testing.assert_close(model(X), wanted + 1, rtol=0, atol=0)
    model.add_adapter("other", PlusConfig())
    found = model(X, adapter_names=["default", "__base__", "other"])
    torch.testing.assert_close(found, wanted + torch.tensor([[1.0], [0.0], [1.0]]), rtol=0, atol=0)


def test_labels_may_be_given_by_position() -> None:
    class Tuples(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return tuple(super().forward(x, labels).values())

    model = get_peft_model(Tuples(), TaskConfig(target_modules=["down"])).train()
    plainly = model(X, labels=Y, task=0)[0]
    TaskAdapter.losses = lambda self: {"one": self.gain.sum() / self.gain.sum()}
    try:
        model.unload()
        get_peft_model(model, TaskConfig(target_modules=["down"])).train()
        for args, kwargs in (((X, Y), {}), ((X,), {"labels": Y})):
            torch.testing.assert_close(model(*args, task=0, **kwargs)[0], plainly + 2, rtol=0, atol=0)  # two layers
    finally:
        del TaskAdapter.losses


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trained_before", [True, False])
def test_a_loss_on_outputs_further_in_is_followed(reentrant: bool, trained_before: bool) -> None:
    """A model that checkpoints by itself recomputes the call that gave the outputs, wherever in them a tensor is."""

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> dict[str, Any]:
            states = []
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
                states.append(x * 1)
            return {"logits": x, "hidden_states": tuple(states)}

    model = get_peft_model(States(), TaskConfig(target_modules=["0", "1"])).train()
    x = X.clone().requires_grad_()
    if trained_before:
        model(x, task=0)["logits"].sum().backward()
        model.zero_grad()
    model(x, task=1)["hidden_states"][0].sum().backward()
    first, second = (adapter.gain.grad for adapter in model.get_adapters().values())
    assert first[0] == 0 and first[1] != 0 and second is None


@pytest.mark.parametrize(
    ("merged", "same", "others"),
    [
        ("x", "x", ["y", 1]),
        (1, torch.tensor([1, 1, 1]), [0, [1, 0, 1], "x"]),
        (torch.tensor([1, 0, 1]), [1, 0, 1], [torch.tensor([1, 1]), [1, 1, 1], "x"]),
    ],
)
def test_merging_for_any_value_of_an_argument(merged: Any, same: Any, others: list[Any]) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TaskConfig(target_modules=["0"]))
    model.merge_adapter(task=merged)
    assert torch.equal(model(X), model(X, task=same))
    for other in others:
        with pytest.raises(RequestError, match="this call has another task"):
            model(X, task=other)


def test_an_adapter_may_go_while_another_thread_trains() -> None:
    model = plain()
    model.set_adapter("b")
    model.train()
    inside, gone = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        assert gone.wait(60)

    model.layers[1].norm.register_forward_pre_hook(pause)
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(model(X))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    model.delete_adapter("b")
    gone.set()
    thread.join()
    assert isinstance(found[0], dict)


def test_taking_an_operation_back_leaves_running_calls_alone() -> None:
    model = plain()
    state = model._peft
    inside = Request(("b",))
    calls = state.routing.use(inside)
    undo = Undo()
    undo.keep_state(state)
    calls.__enter__()
    state.active, state.routing.default = (), Request()
    undo.__exit__(ZeroDivisionError, None, None)
    assert state.active == ("a",) and state.routing.default == Request(("a",))
    assert state.routing._in_flight == (inside,)
    calls.__exit__(None, None, None)


def test_an_exception_leaves_nothing_behind() -> None:
    model = adapted().eval()
    wanted = model(X, task_ids=1)["logits"]
    with pytest.raises(RequestError, match="task_ids has 5 entries"):
        model(X, task_ids=[0, 1, 0, 1, 0])
    routing = model._peft.routing
    assert (routing._requests, routing._in_flight, routing._traced) == ({}, (), None)
    assert torch.equal(model(X, task_ids=1)["logits"], wanted)


def test_data_are_not_run_through_a_model_that_is_not_built_yet() -> None:
    with pytest.raises(TargetError, match="changes the model's build, so data cannot be run through it"):
        get_peft_model(net(), BUILT, calibration=BATCHES)
    get_peft_model(net(), ALL, calibration=BATCHES)


def test_blocks_of_a_changed_build_know_whose_call_they_recompute() -> None:
    model = net()
    for block in model.layers:
        block._gradient_checkpointing_func = checkpoint
    get_peft_model(model, BUILT)
    functions = [block._gradient_checkpointing_func for block in model.layers]
    assert [remembers(function) for function in functions] == [checkpoint, checkpoint]
    assert checkpoint not in functions
    model.unload()
    assert [block._gradient_checkpointing_func for block in model.layers] == [checkpoint, checkpoint]


def test_deltas_of_linear_layers_see_flat_rows_everywhere() -> None:
    """Alone, per row, before another adapter, and as part of a gate."""
    seen: list[int] = []

    class Seen(SumAdapter):
        def delta(self, x: Tensor) -> Tensor:
            seen.append(x.dim())
            return super().delta(x)

    class SeenConfig(SumConfig):
        peft_type: ClassVar[str] = "TOYSEEN"

    name = register_method(plugin(SeenConfig, Seen), replace=True).name
    try:
        model = get_peft_model(net(), SeenConfig(target_modules=["layers.0.down"]), "a")
        model.add_adapter("b", SeenConfig(target_modules=["layers.0.down"]))
        model.add_adapter("gate", AllConfig(target_modules=["layers.0.down"], others=("a", "b")))
        model.add_adapter("gain", GainConfig(target_modules=["layers.0.down"]))
        randomise(model, "a")
        x = torch.randn(2, 3, 4)
        rows = torch.stack([model(row)["logits"] for row in x])
        # Sums of four and eight products in another order.
        torch.testing.assert_close(model(x)["logits"], rows, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x, adapter_names=["a", "b"])["logits"][0], rows[0], rtol=1e-5, atol=1e-5)
        model.set_adapter(["a", "gain"])
        torch.testing.assert_close(model(x)["logits"], rows, rtol=1e-5, atol=1e-5)
        model.set_adapter("gate")
        rows = torch.stack([model(row, task_ids=0)["logits"] for row in x])
        torch.testing.assert_close(model(x, task_ids=0)["logits"], rows, rtol=1e-5, atol=1e-5)
    finally:
        unregister_method(name)
    assert set(seen) == {2} and len(seen) >= 7


def test_sites_may_come_while_positions_are_counted(monkeypatch: Any) -> None:
    model = adapted()
    state = model._peft
    chain = Site.chain

    def adding(site: Site, active: tuple[str, ...]) -> Any:
        state.sites[f"new {len(state.sites)}"] = site
        return chain(site, active)

    monkeypatch.setattr(Site, "chain", adding)
    assert extra_positions(state) == 0

"""Calls and what adapters know of them, root sites, loss terms, links to other adapters, seeded tensors.

On plain torch: no transformers, no plugin.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Block, GainConfig, ShiftConfig, SumConfig, digest, plugin, randomise, toys

from peft_core import (
    Adapter,
    AdapterConfig,
    AdapterNameError,
    AdapterNotFoundError,
    Call,
    CheckpointMismatchError,
    Link,
    MergeError,
    PeftModel,
    RequestError,
    Seeded,
    SiteRequest,
    TargetedConfig,
    get_peft_model,
    hookimpl,
    register_method,
    unregister_method,
)

WIDTH = 6


# -- toys --------------------------------------------------------------------------------------------------------


class TaskConfig(TargetedConfig):
    """A gain for each task."""

    peft_type: ClassVar[str] = "TOYTASK"
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)


class TaskAdapter(Adapter):
    def __init__(self, layer: Any, config: TaskConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(3, layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        out: Tensor = base(x)
        return out * self.gain[base.call.rows("task_ids", len(x))]


class SpyConfig(TargetedConfig):
    """Notes what it is told of a call; adds a loss term where `loss` says so."""

    peft_type: ClassVar[str] = "TOYSPY"
    request_arguments: ClassVar[tuple[str, ...]] = ("note",)
    loss: float = 0.0
    error: bool = False


class SpyAdapter(Adapter):
    seen: ClassVar[list[Any]] = []

    def __init__(self, layer: Any, config: SpyConfig) -> None:
        super().__init__(layer)
        self.config = config
        self.weight = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = base.call
        self.seen.append((call.phase, call.past_length, dict(call.arguments), sorted(call.inputs)))
        if self.config.error:
            raise ValueError("no such luck")
        if self.config.loss:
            call.add_loss("spied", self.config.loss * self.weight.sum())
        return base(*args, **kwargs)

    def losses(self) -> dict[str, Tensor]:
        return {"small": self.config.loss * self.weight.square().sum()} if self.config.loss else {}


class BlindConfig(TargetedConfig):
    """Asks for a call that nobody describes."""

    peft_type: ClassVar[str] = "TOYBLIND"


class BlindAdapter(Adapter):
    def __init__(self, layer: Any, config: BlindConfig) -> None:
        super().__init__(layer)
        self.weight = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base.call.phase


class BlockConfig(TargetedConfig):
    """A gain behind a module of any kind."""

    peft_type: ClassVar[str] = "TOYBLOCK"


class BlockAdapter(Adapter):
    def __init__(self, layer: Any, config: BlockConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs) * self.gain


class UsersConfig(AdapterConfig):
    """The mean of other adapters' outputs at one place."""

    peft_type: ClassVar[str] = "TOYUSERS"
    others: tuple[str, ...]
    at: str
    way: str = "through"

    def refers_to(self) -> Sequence[str]:
        return self.others


class UsersAdapter(Adapter):
    def __init__(self, layer: Any, config: UsersConfig) -> None:
        super().__init__(layer)
        self.config = config
        self.gate = layer.parameter(len(config.others))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, 1 / len(self.config.others))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        out = base(x)
        if self.config.way == "through":
            outs = [base.through(name, x, out=out) for name in self.config.others]
        else:
            outs = []
            for name in self.config.others:
                with base.adapters(name):
                    outs.append(base._site(x))
        return torch.stack(outs, -1) @ self.gate


class RootConfig(AdapterConfig):
    """Around the whole model: scales its output; `weigh` reads the model's parameters instead."""

    peft_type: ClassVar[str] = "TOYROOT"
    weigh: bool = False


class RootAdapter(Adapter):
    def __init__(self, layer: Any, config: RootConfig) -> None:
        super().__init__(layer)
        self.weigh = config.weigh
        self.scale = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        if self.weigh:
            return base.layer.call({n: p * self.scale for n, p in base.params().items()}, *args, **kwargs)
        return base(*args, **kwargs) * self.scale


def sites_at(choose: Any) -> Any:
    @hookimpl
    def peft_sites(config: Any) -> list[SiteRequest]:
        return [SiteRequest(choose(config))]

    return peft_sites


@pytest.fixture(scope="module", autouse=True)
def _methods() -> Iterator[None]:
    made = [
        plugin(TaskConfig, TaskAdapter),
        plugin(SpyConfig, SpyAdapter),
        plugin(BlindConfig, BlindAdapter),
        plugin(UsersConfig, UsersAdapter),
        plugin(RootConfig, RootAdapter),
        plugin(BlockConfig, BlockAdapter),
    ]
    made[3].peft_sites = sites_at(lambda config: config.at)
    made[4].peft_sites = sites_at(lambda config: "")
    with toys():
        names = [register_method(one, replace=True).name for one in made]
        yield
        for name in names:
            unregister_method(name)


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SpyAdapter.seen.clear()


class Net(nn.Module):
    """Blocks of linear layers that may recompute themselves."""

    def __init__(self, checkpointing: str | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(WIDTH, checkpointing) for _ in range(2))

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net(checkpointing: str | None = None) -> Net:
    torch.manual_seed(0)
    return Net(checkpointing)


def tasked(checkpointing: str | None = None) -> Any:
    model = get_peft_model(net(checkpointing), TaskConfig(target_modules=["down"]))
    randomise(model)
    return model


def draw(rows: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# -- Call.rows ---------------------------------------------------------------------------------------------------


def test_rows_are_repeated_as_beams_are() -> None:
    call = Call({}, {"task": torch.tensor([3, 1])})
    assert call.rows("task", 2).tolist() == [3, 1]
    assert call.rows("task", 6).tolist() == [3, 3, 3, 1, 1, 1]


@pytest.mark.parametrize("value", [2, torch.tensor(2), [2], torch.tensor([2])])
def test_one_value_is_for_all_rows(value: Any) -> None:
    assert Call({}, {"task": value}).rows("task", 3).tolist() == [2, 2, 2]


def test_rows_may_have_more_axes() -> None:
    spans = torch.arange(4).view(2, 2)
    assert Call({}, {"span": spans}).rows("span", 4).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("size", [1, 4])
def test_rows_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(RequestError, match=f"task has 3 entries, but a layer received {size} rows"):
        Call({}, {"task": [1, 2, 3]}).rows("task", size)


@pytest.mark.parametrize("given", [{}, {"task": None}])
def test_rows_that_were_not_given_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="this call needs task: pass task="):
        Call({}, given).rows("task", 2)


def test_rows_of_a_part_of_the_batch() -> None:
    whole = Call({}, {"task": [5, 6]})
    part = whole.of_rows(torch.tensor([3, 0]), 4)
    assert part.rows("task", 2).tolist() == [6, 5]
    part.scratch["note"] = 1
    part.add_loss("term", torch.tensor(1.0))
    assert whole.scratch == {"note": 1} and whole.losses == {"term": 1}  # one call all the same


def test_inputs_of_the_model_are_cut_to_rows_too() -> None:
    mask = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]])
    part = Call({"attention_mask": mask}, {}).of_rows(torch.tensor([3, 1]), 4)
    assert part.rows("attention_mask", 2).tolist() == [[0, 0], [0, 1]]


# -- the facts of a call -----------------------------------------------------------------------------------------


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("cache", "length"),
    [
        (None, 0),
        (Cache(0), 0),
        (Cache(7), 7),
        ((), 0),
        ((None,), 0),
        (((torch.zeros(2, 1, 5, 3), torch.zeros(2, 1, 5, 3)),), 5),
    ],
)
def test_past_length_and_phase(cache: Any, length: int) -> None:
    call = Call({"past_key_values": cache}, {})
    assert call.past_length == length
    assert call.phase == ("decode" if length else "score")
    outer = Call({}, {}, generating=True)
    assert Call({"past_key_values": cache}, {}, outer=outer).phase == ("decode" if length else "prefill")
    assert Call({"past_key_values": cache}, {}, training=True).phase == "train"


def test_a_call_within_a_call_inherits_arguments_and_what_is_carried() -> None:
    outer = Call({}, {"a": 1, "b": 2})
    outer.carried["x"], outer.scratch["x"] = 1, 1
    inner = Call({}, {"b": 3}, outer=outer)
    assert inner.arguments == {"a": 1, "b": 3} and inner.carried == {"x": 1} and inner.scratch == {}


def test_a_layer_sees_the_call() -> None:
    model = get_peft_model(net(), SpyConfig(target_modules=["layers.0.up"]))
    x = draw()
    model.eval()(x, note="hello")
    model(x=x, past_key_values=Cache(3))
    model.train()(x)
    assert SpyAdapter.seen == [
        ("score", 0, {"note": "hello"}, ["x"]),
        ("decode", 3, {}, ["past_key_values", "x"]),
        ("train", 0, {}, ["x"]),
    ]


def test_arguments_are_hidden_from_the_base_and_in_the_signature() -> None:
    model = tasked()
    x = draw()
    with pytest.raises(TypeError, match="task_ids"):
        net()(x, task_ids=[0])  # the base has no such argument
    assert model(x, task_ids=[0, 1, 2, 0]).shape == x.shape
    assert list(inspect.signature(model.forward).parameters) == ["x", "past_key_values", "task_ids"]
    assert torch.equal(model.forward(x, task_ids=[0, 1, 2, 0]), model(x, task_ids=[0, 1, 2, 0]))
    model.add_adapter("other", SpyConfig(target_modules=["up"]))
    assert list(inspect.signature(model.forward).parameters)[2:] == ["task_ids", "note"]
    model.delete_adapter("default")
    assert list(inspect.signature(model.forward).parameters)[2:] == ["note"]
    with pytest.raises(TypeError, match="task_ids"):
        model(x, task_ids=0)
    model.unload()
    assert list(inspect.signature(model.forward).parameters) == ["x", "past_key_values"]


def test_an_adapter_that_did_not_ask_is_told_how_to() -> None:
    model = get_peft_model(net(), BlindConfig(target_modules=["up"]))
    with pytest.raises(RequestError, match="set `uses_call = True`"):
        model(draw())


def test_a_layer_called_past_the_model_knows_no_call() -> None:
    model = tasked()
    with pytest.raises(RequestError, match="call the model itself"):
        model.layers[0](draw())


def test_a_call_is_forgotten_when_nothing_needs_it() -> None:
    model = tasked()
    held = []

    class Watched(dict[str, Any]):
        pass

    note = Watched()
    held.append(weakref.ref(note))
    model.eval()
    with torch.no_grad():
        model(draw(), task_ids=0, past_key_values=note)
    del note
    gc.collect()
    assert held[0]() is None


# -- recompute ---------------------------------------------------------------------------------------------------


def trained(checkpointing: str | None, calls: list[Any], order: list[int] | None) -> list[Tensor]:
    """Gradients of several calls: one backward each, in `order`, or one for all."""
    model = tasked(checkpointing)
    losses = [model(draw(seed=i).requires_grad_(), task_ids=tasks).square().sum() for i, tasks in enumerate(calls)]
    if order is None:
        sum(losses).backward()
    else:
        for index in order:
            losses[index].backward()
    return gradients(model)


CALLS = [[0, 1, 2, 0], [2, 2, 1, 0]]
own_checkpoints = pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])


@own_checkpoints
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_models_own_checkpoints_find_their_call(checkpointing: str, order: list[int]) -> None:
    """The model calls torch.utils.checkpoint itself; two forwards come before the two backwards."""
    expected = trained(None, CALLS, order)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for mine, plain in zip(trained(checkpointing, CALLS, order), expected, strict=True):
        assert torch.equal(mine, plain)


@own_checkpoints
def test_one_backward_through_two_calls_is_refused_where_blocks_do_not_say_whose_they_are(checkpointing: str) -> None:
    with pytest.raises(RequestError, match="calls with different adapters came before one backward"):
        trained(checkpointing, CALLS, None)


def test_without_checkpoints_one_backward_serves_all_calls() -> None:
    assert len(trained(None, CALLS, None)) == 2


@own_checkpoints
def test_a_call_between_forward_and_backward_does_not_matter(checkpointing: str) -> None:
    expected = trained(None, CALLS[:1], [0])
    model = tasked(checkpointing)
    loss = model(draw(seed=0).requires_grad_(), task_ids=CALLS[0]).square().sum()
    with torch.no_grad():
        model(draw(seed=3), task_ids=2)
    loss.backward()
    for mine, plain in zip(gradients(model), expected, strict=True):
        assert torch.equal(mine, plain)


# -- root sites --------------------------------------------------------------------------------------------------


def rooted(**fields: Any) -> Any:
    model = get_peft_model(net(), RootConfig(**fields))
    with torch.no_grad():
        (adapter,) = model._peft.adapters["default"].adapters
        adapter.scale.fill_(3.0)
    return model


def test_a_root_site_acts_and_goes() -> None:
    x, base = draw(), net()
    model = rooted()
    before = [name for name, _ in net().named_modules()]
    assert torch.equal(model(x), 3 * base(x))
    assert torch.equal(model(x=x), 3 * base(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.add_adapter("sum", SumConfig(target_modules=["up"]))
    randomise(model, "sum")
    model.set_adapter(["default", "sum"])
    both = model(x)
    model.set_adapter("sum")
    assert torch.equal(both, 3 * model(x))
    mixed = model(x, adapter_names=["default", "sum", "__base__", "default"])
    torch.testing.assert_close(mixed[[0, 3]], 3 * base(x)[[0, 3]])
    torch.testing.assert_close(mixed[1:3], torch.stack([model(x)[1], base(x)[2]]))
    model.delete_adapter("default")
    assert "" not in model._peft.sites and torch.equal(model(x, adapter_names=["__base__"]), base(x))
    model.unload()
    assert type(model) is Net and [name for name, _ in model.named_modules()] == before
    assert torch.equal(model(x), base(x))


def test_a_root_site_is_no_parameter_twice_and_no_cycle() -> None:
    model = rooted()
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len(list(net().parameters())) + 1
    assert len(list(model.modules())) == len({id(module) for module in model.modules()})
    assert model.base_state_dict().keys() == net().state_dict().keys()
    assert model.train().training and not model.eval().layers[0].training


def test_a_root_site_is_saved_and_loaded(tmp_path: Path) -> None:
    model = rooted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert list(model.get_adapter_state_dict()) == ["base_model.model.scale"]
    assert torch.equal(again(draw()), model(draw()))
    more = get_peft_model(net(), SumConfig(target_modules=["up"]))
    more.load_adapter(tmp_path, "root")
    more.set_adapter("root")
    assert torch.equal(more(draw()), model(draw()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_root_site_is_copied_with_its_model(copied: Any) -> None:
    model = rooted()
    twin = copied(model)
    x, expected = draw(), model(draw())
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected) and not twin(x).any()
    assert twin.unload() is twin and type(twin) is Net
    assert torch.equal(model(x), expected)


def test_a_root_site_compiles() -> None:
    model, x = rooted(), draw()
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        # The same operations, one after the other.
        assert torch.equal(compiled(x), model(x))
    finally:
        torch._dynamo.reset()


def test_a_root_sites_parameters_are_those_of_the_model() -> None:
    model, x = rooted(weigh=True), draw()
    scaled = net()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(3)
    assert torch.equal(model(x), scaled(x))
    with pytest.raises(MergeError, match="cannot be expressed"):
        model.merge_adapter()
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="cannot be compiled"):
            compiled(x)
    finally:
        torch._dynamo.reset()


def test_a_model_that_runs_all_its_children_runs_only_its_own() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    children, expected = list(model), model(draw())
    get_peft_model(model, RootConfig())
    assert torch.equal(model(draw()), expected)
    assert len(model) == 3 and list(model) == children and model[-1] is children[-1]
    model.unload()
    assert len(model) == 3 and list(model.children()) == children


def test_other_weights_of_a_block_reach_the_sites_inside() -> None:
    """Also in a graph, where the same is done in another way."""
    model, x = get_peft_model(net(), ShiftConfig(target_modules=["layers.0"]), "block"), draw()
    randomise(model, "block")
    alone = model(x)
    model.add_adapter("inner", GainConfig(target_modules=["layers.0.up"]))
    assert torch.equal(model(x), alone)
    model.add_adapter("weights", ShiftConfig(target_modules=["layers.0.up"]))
    for order in (["block", "inner"], ["block", "weights"], ["weights", "block", "inner"]):
        model.set_adapter(order)
        for name in order:
            randomise(model, name)
        out = model(x)
        assert not torch.equal(out, alone)
        torch._dynamo.reset()
        try:
            compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), out)
        finally:
            torch._dynamo.reset()
        model.merge_adapter()
        # float32: products with weights that were rounded once more.
        torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(x), out)


def test_rows_of_sites_inside_sites() -> None:
    """A block's site runs the block for some rows at a time: the sites inside must see those rows alone."""
    model, x = get_peft_model(net(), GainConfig(target_modules=["layers.0.up"]), "inner"), draw(6)
    model.add_adapter("outer", BlockConfig(target_modules=["layers.0"]))
    model.add_adapter("task", TaskConfig(target_modules=["layers.0.down"]))
    for name in ("inner", "outer", "task"):
        randomise(model, name)
    names, tasks = ["outer", "inner", "task", "__base__", "task", "outer"], [0, 1, 2, 0, 1, 2]
    mixed = model(x, adapter_names=names, task_ids=tasks)
    for row, name in enumerate(names):
        model.set_adapter([name] if name != "__base__" else [])
        # float32: a product of other sizes may round otherwise.
        torch.testing.assert_close(mixed[row], model(x, task_ids=tasks)[row], rtol=0, atol=1e-6)
    half = model(x, adapter_names=["outer", "inner", "outer"], task_ids=tasks)  # two rows for each name
    model.set_adapter("inner")
    torch.testing.assert_close(half[2:4], model(x, task_ids=tasks)[2:4], rtol=0, atol=1e-6)


# -- loss terms --------------------------------------------------------------------------------------------------


@dataclass
class Out:
    logits: Tensor
    loss: Tensor | None = None


class Labelled(nn.Module):
    """Gives its output in one of several forms."""

    def __init__(self, form: str, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.form, self.checkpointing = form, checkpointing
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        if self.checkpointing is None:
            logits = self.up(x)
        else:
            logits = checkpoint(self.up, x, use_reentrant=self.checkpointing)
        loss = None if labels is None else (logits - labels).square().mean()
        if self.form == "tensor":
            return logits
        if self.form == "tuple":
            return (logits,) if loss is None else (loss, logits)
        if self.form == "dict":
            return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
        return Out(logits, loss)


def labelled(form: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Labelled(form, **fields), SpyConfig(target_modules=["up"], loss=0.5))


def loss_of(outputs: Any) -> Tensor | None:
    if isinstance(outputs, tuple):
        return outputs[0] if len(outputs) == 2 else None
    return outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)


@pytest.mark.parametrize("form", ["tuple", "dict", "object"])
def test_terms_are_in_the_loss_of_training_alone(form: str) -> None:
    model, x, y = labelled(form), draw(), draw(seed=2)
    plain = loss_of(model.eval()(x, labels=y))
    model.train()
    with torch.no_grad():
        assert torch.equal(loss_of(model(x, labels=y)), plain)  # as an evaluation in the middle of an epoch
    with_terms = loss_of(model(x, labels=y))
    assert plain is not None and with_terms is not None
    assert torch.equal(with_terms, plain + 1.0)  # 0.5 * 1, and 0.5 * 1²
    assert {name: term.item() for name, term in model.adapter_losses().items()} == {"spied": 0.5, "small": 0.5}
    assert loss_of(model(x)) is None
    with model.disable_adapter():
        assert torch.equal(loss_of(model(x, labels=y)), plain)
    assert model.adapter_losses() == {}


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_what_is_no_loss_is_left_alone(form: str) -> None:
    model, x = labelled(form).train(), draw()
    out = model(x)
    logits = out if form == "tensor" else out[0]
    with model.disable_adapter():
        assert torch.equal(logits, torch.as_tensor(model(x) if form == "tensor" else model(x)[0]))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "object"])
def test_gradients_of_terms_reach_the_adapter(form: str) -> None:
    model, x, y = labelled(form).train(), draw(), draw(seed=2)
    out = model(x, labels=y)
    loss = loss_of(out) if form != "tensor" else out.sum() + sum(model.adapter_losses().values())
    assert loss is not None
    loss.backward()
    (weight,) = (p for p in model.parameters() if p.requires_grad)
    assert torch.equal(weight.grad, torch.tensor([0.5 + 1.0]))  # of 0.5 w, and of 0.5 w² at 1


def test_terms_inside_checkpoints() -> None:
    x, y = draw(), draw(seed=2)
    model = labelled("object", checkpointing=False).train()
    model(x.requires_grad_(), labels=y).loss.backward()
    (weight,) = (p for p in model.parameters() if p.requires_grad)
    assert torch.equal(weight.grad, torch.tensor([1.5]))
    model = labelled("object", checkpointing=True).train()
    with pytest.raises(RequestError, match="use_reentrant=False"):
        model(x, labels=y)
    with torch.no_grad():
        assert float(model.eval()(x, labels=y).loss) >= 0  # nothing trains, so nothing is lost


def test_terms_are_not_copied_with_the_model() -> None:
    model = labelled("object").train()
    model(draw(), labels=draw(seed=2))
    assert model.adapter_losses()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.adapter_losses() == {}
        twin(draw(), labels=draw(seed=2))
        assert twin.adapter_losses().keys() == {"spied", "small"}


# -- other adapters ----------------------------------------------------------------------------------------------

AT = "layers.0.up"


def several(way: str = "through") -> Any:
    model = get_peft_model(net(), SumConfig(target_modules=[AT]), "first")
    model.add_adapter("second", GainConfig(target_modules=[AT]))
    model.add_adapter("elsewhere", SumConfig(target_modules=["layers.1.up"]))
    for seed, name in enumerate(("first", "second", "elsewhere")):
        randomise(model, name, seed=seed)
    model.add_adapter("users", UsersConfig(others=("first", "second", "elsewhere"), at=AT, way=way))
    return model


@pytest.mark.parametrize("way", ["through", "adapters"])
def test_outputs_of_other_adapters_at_a_site(way: str) -> None:
    model, x = several(way), draw()
    site = model.get_submodule(AT)
    outs = []
    for name in ("first", "second", "elsewhere"):
        model.set_adapter(name)
        outs.append(site(x))
    assert not torch.equal(outs[0], outs[1])
    model.set_adapter("users")
    # float32: a sum of three products, once as a matrix product.
    torch.testing.assert_close(site(x), torch.stack(outs).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(outs[2], net().layers[0].up(x), rtol=0, atol=0)  # not at this site


def test_the_base_inside_and_the_choice_outside() -> None:
    model, x = several(), draw()
    model.set_adapter(["first", "elsewhere"])
    site = model.get_submodule(AT)
    link = Link(site)
    outside = model(x)
    with link.adapters():
        inside = model(x)
        with link.adapters("elsewhere"):
            nested = model(x)
        assert torch.equal(model(x), inside)
    assert torch.equal(inside, net()(x)) and torch.equal(model(x), outside)
    model.set_adapter("elsewhere")
    assert torch.equal(nested, model(x))
    with pytest.raises(ZeroDivisionError), link.adapters("first"):
        _ = 1 / 0
    assert torch.equal(model(x), nested)


@pytest.mark.parametrize("use", ["through", "adapters"])
def test_an_unknown_adapter_is_refused(use: str) -> None:
    model, x = several(), draw()
    link = Link(model.get_submodule(AT))
    with pytest.raises(AdapterNotFoundError, match="no adapter 'third'"):
        link.through("third", x) if use == "through" else link.adapters("third").__enter__()


def test_adapters_that_others_are_made_of_must_be_there_and_stay(tmp_path: Path) -> None:
    missing = UsersConfig(others=("first", "third"), at=AT)
    plain = net()
    with pytest.raises(AdapterNotFoundError, match="lacks \\['first', 'third'\\]"):
        get_peft_model(plain, missing)
    assert type(plain) is Net
    model = several()
    before = digest(model)
    with pytest.raises(AdapterNotFoundError, match="lacks \\['third'\\]"):
        model.add_adapter("more", missing)
    with pytest.raises(AdapterNameError, match="'first' is part of \\['users'\\]"):
        model.delete_adapter("first")
    assert digest(model) == before
    model.save_pretrained(tmp_path, selected_adapters=["users"])
    model.delete_adapter("users")
    model.delete_adapter("first")
    with pytest.raises(AdapterNotFoundError, match="lacks \\['first'\\]"):
        model.load_adapter(tmp_path / "users", "users")
    model.add_adapter("first", SumConfig(target_modules=[AT]))
    model.load_adapter(tmp_path / "users", "users")
    assert list(model.peft_config) == ["second", "elsewhere", "first", "users"]


# -- errors ------------------------------------------------------------------------------------------------------


def test_an_error_says_where_and_whose_it_is_once() -> None:
    model = get_peft_model(net(), SpyConfig(target_modules=["layers.1.down"], error=True), "spy")
    model.add_adapter("root", RootConfig())
    model.add_adapter("sum", SumConfig(target_modules=["layers.1.down"]))
    model.set_adapter(["root", "spy", "sum"])
    with pytest.raises(ValueError, match="no such luck") as caught:
        model(draw())
    (note,) = caught.value.__notes__
    assert "layers.1.down" in note and "'spy' (SpyAdapter)" in note and "'sum' (SumAdapter)" in note
    assert "RootAdapter" not in note


def test_an_error_of_the_base_alone_gets_no_note() -> None:
    model = get_peft_model(net(), SumConfig(target_modules=["up"]))
    with model.disable_adapter(), pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, WIDTH + 1))
    assert not getattr(caught.value, "__notes__", [])


# -- seeded tensors ----------------------------------------------------------------------------------------------


def test_seeded_tensors_are_made_again() -> None:
    torch.manual_seed(5)
    first = Seeded((3, 2), 7)
    torch.randn(3)
    assert torch.equal(first.value, Seeded((3, 2), 7).value)
    assert not torch.equal(first.value, Seeded((3, 2), 8).value)
    assert list(first.state_dict()) == ["checksum"]
    assert not list(first.parameters()) and not first.value.requires_grad
    drawn = torch.Generator().manual_seed(7)
    assert torch.equal(first.value, torch.randn(3, 2, generator=drawn))


def test_seeded_tensors_draw_as_they_are_told_and_leave_global_randomness_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    made = Seeded((4, 3), 1, lambda shape, generator: torch.rand(*shape, generator=generator).t(), dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert made.value.shape == (3, 4) and made.value.dtype == torch.float64 and made.value.is_contiguous()
    # As drawn, in float32; the dtype is that of the copy that is used.
    assert int(made.checksum) == int(Seeded((4, 3), 1, lambda s, g: torch.rand(*s, generator=g).t()).checksum)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casts_change_the_value_and_not_the_checksum(cast: Any) -> None:
    plain, made = Seeded((3, 2), 7), cast(nn.ModuleDict({"bank": Seeded((3, 2), 7)}))["bank"]
    assert made.checksum.dtype == torch.int64 and torch.equal(made.checksum, plain.checksum)
    assert made.value.dtype != torch.float32 and torch.equal(made.value, plain.value.to(made.value.dtype))
    made.check(plain.checksum, "a")


def test_seeded_tensors_are_copied_and_moved() -> None:
    made = Seeded((3, 2), 7)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin.value, made.value) and twin.value is not made.value
        twin.check(made.checksum, "a")
    away = copy.deepcopy(made).to("meta")
    assert away.value.is_meta and away.checksum.is_meta
    assert Seeded((3, 2), 7, device="meta").value.is_meta


def test_other_numbers_are_refused() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"adapter 'a'.*shape \(3, 2\).*not the one of the file"):
        Seeded((3, 2), 7).check(Seeded((3, 2), 8).checksum, "a")


def test_terms_are_scalars() -> None:
    call = Call({}, {})
    with pytest.raises(RequestError, match=r"'spread' is a tensor of shape \(2,\).*a term is a scalar"):
        call.add_loss("spread", torch.ones(2))
    assert call.losses == {}

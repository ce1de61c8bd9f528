"""Extension point E15: methods that act at an optimizer's steps, proved by small methods of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import (
    DeltaAdapter,
    MethodContractError,
    PeftError,
    TargetedConfig,
    drive,
    get_peft_model,
)
from tests.tiny_transformers import fresh
from tests.toy_plugins import net, plugin, randomise, registered


class RankConfig(TargetedConfig):
    """Low-rank updates whose ranks compete for a budget, by how much the loss is sensitive to them."""

    peft_type: ClassVar[str] = "TOYRANK"
    r: int = 4
    budget: int = 5
    start: int = 1


class RankAdapter(DeltaAdapter):
    sensitivity: Tensor
    alive: Tensor

    def __init__(self, layer: Any, config: RankConfig) -> None:
        super().__init__(layer)
        self.a = layer.parameter(config.r, layer.in_features)
        self.e = layer.parameter(config.r)
        self.b = layer.parameter(layer.out_features, config.r)
        self.register_buffer("sensitivity", torch.zeros(config.r))
        self.register_buffer("alive", torch.ones(config.r))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.a, std=0.3)
        nn.init.zeros_(self.e)
        nn.init.normal_(self.b, std=0.3)

    def delta(self, x: Tensor) -> Tensor:
        return x @ self.a.t() * self.e @ self.b.t()


EVENTS: list[tuple[str, int]] = []
SEEN: list[Tensor] = []


def allocate(config: RankConfig, adapters: Mapping[str, RankAdapter], event: str, step: int) -> None:
    EVENTS.append((event, step))
    every = list(adapters.values())
    if event == "after":
        for adapter in every:
            adapter.e.data.mul_(adapter.alive)
        return
    SEEN.append(torch.cat([adapter.e.grad for adapter in every]))
    for adapter in every:
        adapter.sensitivity.mul_(0.5).add_(adapter.e.grad.abs(), alpha=0.5)
    if step >= config.start:
        all_of_them = torch.cat([adapter.sensitivity for adapter in every])
        threshold = all_of_them.sort(descending=True).values[config.budget - 1]
        for adapter in every:
            adapter.alive.copy_(adapter.sensitivity >= threshold)


class StepConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYSTEP"
    does: str = "nothing"


class StepAdapter(DeltaAdapter):
    basis: Tensor

    def __init__(self, layer: Any, config: StepConfig) -> None:
        super().__init__(layer)
        self.w = layer.parameter(layer.out_features, layer.in_features)
        self.register_buffer("basis", torch.linalg.qr(torch.randn(layer.out_features, 2)).Q)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w)

    def delta(self, x: Tensor) -> Tensor:
        return x @ self.w.t()


def train_one_site_at_a_time(adapters: Mapping[str, StepAdapter], step: int, optimizer: torch.optim.Optimizer) -> None:
    for index, adapter in enumerate(adapters.values()):
        chosen = index == step % len(adapters)
        adapter.w.requires_grad_(chosen)
        if not chosen:
            adapter.w.grad = None
            optimizer.state.pop(adapter.w, None)


def act(
    config: StepConfig,
    adapters: Mapping[str, StepAdapter],
    event: str,
    step: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    if config.does == "choose":
        if event == "before":  # the gradients that came meanwhile are of the sites chosen last time
            train_one_site_at_a_time(adapters, step, optimizer)
        else:
            train_one_site_at_a_time(adapters, step + 1, optimizer)
    for adapter in adapters.values():
        if config.does == "project" and event == "before":
            adapter.w.grad -= adapter.basis @ (adapter.basis.t() @ adapter.w.grad)
        if config.does == "clamp" and event == "after":
            adapter.w.data *= (0.01 / adapter.w.data.norm()).clamp(max=1)


def groups(parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
    named: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in parameters.items():
        named[name.endswith(".b")].append(parameter)
    return [{"params": named[False]}, {"params": named[True], "lr": 16 * lr, "weight_decay": 0.0}]


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    EVENTS.clear()
    SEEN.clear()
    rank = plugin(RankConfig, RankAdapter, peft_step=allocate, peft_param_groups=groups)
    with registered(rank, plugin(StepConfig, StepAdapter, peft_step=act)):
        yield


GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(8, 6, generator=GENERATOR), torch.arange(8) % 4) for _ in range(8)]


def ranked(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(net(), RankConfig(target_modules=["up", "down"], **fields)).train()
    return randomise(model)


def train(model: Any, optimizer: Any, accumulate: int = 1, backward: Callable[[Tensor], Any] = Tensor.backward) -> None:
    for index, (x, labels) in enumerate(BATCHES):
        backward(model(x, labels=labels).loss / accumulate)
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def parameters(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_a_mask_driven_by_gradients_in_a_plain_loop() -> None:
    """With accumulation: four steps of two batches each, beside the same by hand."""
    model, twin = ranked(), ranked()
    optimizer = torch.optim.SGD(parameters(model), lr=0.5)
    drive(model, optimizer)
    train(model, optimizer, accumulate=2)
    assert [(event, step) for step in range(4) for event in ("before", "after")] == EVENTS

    by_hand = torch.optim.SGD(parameters(twin), lr=0.5)
    adapters = twin._peft.record("default").adapters
    sensitivity, alive = torch.zeros(16), torch.ones(16)
    for step in range(4):
        batches = BATCHES[2 * step : 2 * step + 2]
        sum(twin(x, labels=labels).loss / 2 for x, labels in batches).backward()
        gradient = torch.cat([adapter.e.grad for adapter in adapters])
        torch.testing.assert_close(SEEN[step], gradient, rtol=1e-4, atol=1e-7)  # summed in another order
        sensitivity = 0.5 * sensitivity + 0.5 * gradient.abs()
        if step >= 1:
            alive = torch.zeros(16).index_fill(0, sensitivity.topk(5).indices, 1.0)
        by_hand.step()
        by_hand.zero_grad()
        with torch.no_grad():
            for adapter, mask in zip(adapters, alive.split(4), strict=True):
                adapter.e.mul_(mask)
    found = torch.cat([adapter.e for adapter in model._peft.record("default").adapters])
    torch.testing.assert_close(found, torch.cat([adapter.e for adapter in adapters]), rtol=1e-4, atol=1e-6)
    assert found.count_nonzero() == 5


def test_accelerate_needs_the_same_line() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # one for the process: a `Trainer` may have left its own
    GradientState._reset_state()
    plain, model = ranked(), ranked()
    optimizer = torch.optim.SGD(parameters(plain), lr=0.5)
    drive(plain, optimizer)
    train(plain, optimizer, accumulate=2)
    expected = list(EVENTS)
    EVENTS.clear()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, wrapped = accelerator.prepare(model, torch.optim.SGD(parameters(model), lr=0.5))
    drive(accelerator.unwrap_model(prepared), wrapped)
    for x, labels in BATCHES:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(x, labels=labels).loss)
            wrapped.step()
            wrapped.zero_grad()
    assert EVENTS == expected == [(event, step) for step in range(4) for event in ("before", "after")]
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_trainer_needs_no_call_and_numbers_steps_exactly(tmp_path: Path) -> None:
    """Also after a resume, where masks and what they are made from come back with the adapter."""
    from tests.trainer_scenarios import adapt, resumes_exactly, sentences, strict_warnings

    def make(seed: int) -> Any:
        return adapt(fresh("llama"), RankConfig(target_modules=["q_proj", "v_proj"], start=0), seed=seed)

    with strict_warnings():
        model = resumes_exactly(make, tmp_path, sentences(), gradient_accumulation_steps=2)
    steps = [0, 1, 2, 3, 2, 3]  # four, and the last two once more
    assert [(event, step) for step in steps for event in ("before", "after")] == EVENTS
    ranks = torch.cat([adapter.e for adapter in model._peft.record("default").adapters])
    assert ranks.count_nonzero() == 5


def test_trainer_with_an_optimizer_of_the_users(tmp_path: Path) -> None:
    from tests.trainer_scenarios import sentences, strict_warnings, trainer

    model = get_peft_model(fresh("llama"), RankConfig(target_modules=["q_proj"]))
    with strict_warnings():
        run = trainer(model, tmp_path, sentences(), save_strategy="no")
        run.optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.01))
        run.train()
    assert [step for event, step in EVENTS if event == "before"] == [0, 1, 2, 3]
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [0.01, 0.16]


def test_a_trainer_that_makes_its_own_optimizer(tmp_path: Path) -> None:
    from transformers import Trainer

    from tests.trainer_scenarios import sentences, strict_warnings, trainer

    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.AdamW(self.model.parameter_groups(lr=0.01))
            return self.optimizer

    model = get_peft_model(fresh("llama"), RankConfig(target_modules=["q_proj"]))
    with strict_warnings():
        run = trainer(model, tmp_path, sentences(), save_strategy="no")
        Own(model, run.args, train_dataset=sentences()).train()
    assert [step for event, step in EVENTS if event == "before"] == [0, 1, 2, 3]


def test_a_wrapped_model_is_driven_as_the_model_inside() -> None:
    model = ranked()
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    drive(torch.nn.DataParallel(torch.compile(model, backend="eager")), optimizer)
    train(model, optimizer, accumulate=4)
    assert [step for event, step in EVENTS if event == "before"] == [0, 1]


def test_a_step_that_a_scaler_skips_is_no_event() -> None:
    model = ranked()
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    drive(model, optimizer, step=7)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, labels = BATCHES[0]
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(x, labels=labels).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [step for event, step in EVENTS if event == "before"] == [7, 8]


def test_driving_again_replaces_and_removing_ends_it() -> None:
    model = ranked()
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    drive(model, optimizer)
    again = drive(model, optimizer, step=3)
    train(model, optimizer, accumulate=4)
    assert [step for event, step in EVENTS if event == "before"] == [3, 4] and again.step == 5
    again.remove()
    train(model, optimizer)
    assert len(EVENTS) == 4
    with pytest.raises(PeftError, match="needs a torch.optim.Optimizer"):
        drive(model, object())
    with pytest.raises(PeftError, match="no adapters"):
        drive(net(), optimizer)


def test_only_active_and_trainable_adapters_hear_of_steps() -> None:
    model = ranked()
    model.add_adapter("other", StepConfig(target_modules=["up"]))
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    drive(model, optimizer)
    model.set_adapter("other")
    train(model, optimizer)
    assert EVENTS == []
    model.set_adapter(["default", "other"])
    model.set_requires_grad("default", False)
    train(model, optimizer)
    assert EVENTS == []


def test_gradients_are_switched_in_the_middle_of_a_run_and_the_optimizer_learns_of_it() -> None:
    model = get_peft_model(net(), StepConfig(target_modules=["up"], does="choose")).train()
    first, second = (adapter.w for adapter in model._peft.record("default").adapters)
    optimizer = torch.optim.AdamW(parameters(model), lr=0.1, weight_decay=0.1)
    drive(model, optimizer)
    for step, (x, labels) in enumerate(BATCHES):
        before = [first.detach().clone(), second.detach().clone()]
        model(x, labels=labels).loss.backward()
        assert step == 0 or [w.grad is not None for w in (first, second)] == [step % 2 == 0, step % 2 == 1]
        optimizer.step()
        moved = [not torch.equal(w, old) for w, old in zip((first, second), before, strict=True)]
        assert moved == [step % 2 == 0, step % 2 == 1]  # not even the weight decay moves what rests
        assert not optimizer.state  # of what was trained last, and rests now
        optimizer.zero_grad()
    model.set_adapter("default")
    assert first.requires_grad and second.requires_grad


def test_gradients_are_projected_before_a_step() -> None:
    model = get_peft_model(net(), StepConfig(target_modules=["up"], does="project")).train()
    optimizer = torch.optim.SGD(parameters(model), lr=1.0)
    drive(model, optimizer)
    train(model, optimizer)
    for adapter in model._peft.record("default").adapters:
        assert adapter.w.norm() > 0.1
        assert (adapter.basis.t() @ adapter.w).abs().max() < 1e-6  # eight steps of float32, of numbers below one
    plain = get_peft_model(net(), StepConfig(target_modules=["up"])).train()
    optimizer = torch.optim.SGD(parameters(plain), lr=1.0)
    drive(plain, optimizer)
    train(plain, optimizer)
    for adapter in plain._peft.record("default").adapters:
        assert (adapter.basis.t() @ adapter.w).abs().max() > 1e-3


def test_parameters_are_projected_after_a_step() -> None:
    norms: dict[str, list[float]] = {}
    for does in ("nothing", "clamp"):
        model = get_peft_model(net(), StepConfig(target_modules=["up"], does=does)).train()
        optimizer = torch.optim.Adam(parameters(model), lr=0.1)
        drive(model, optimizer)
        train(model, optimizer)
        norms[does] = [float(adapter.w.detach().norm()) for adapter in model._peft.record("default").adapters]
    assert min(norms["nothing"]) > 0.1
    assert norms["clamp"] == pytest.approx([0.01, 0.01], rel=1e-5)


def test_groups_of_parameters_are_the_methods_and_the_rest_comes_last() -> None:
    model = get_peft_model(net(), RankConfig(target_modules=["up"], modules_to_save=["head"]))
    found = model.parameter_groups(lr=0.1, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in found] == [(0.1, 0.3), (1.6, 0.0)]
    adapters = model._peft.record("default").adapters
    assert {id(p) for p in found[1]["params"]} == {id(a.b) for a in adapters if isinstance(a, RankAdapter)}
    extra = nn.Parameter(torch.zeros(1))
    model.register_parameter("own", extra)
    assert model.parameter_groups(lr=0.1)[-1] == {"lr": 0.1, "weight_decay": 0.0, "params": [extra]}
    given = [p for group in model.parameter_groups(lr=0.1) for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in parameters(model)} and len(given) == len(parameters(model))


def test_groups_that_forget_a_parameter_are_refused() -> None:
    def forgetful(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": list(parameters.values())[1:]}]

    class ForgetfulConfig(StepConfig):
        peft_type: ClassVar[str] = "TOYFORGETFUL"

    with registered(plugin(ForgetfulConfig, StepAdapter, peft_param_groups=forgetful)):
        model = get_peft_model(net(), ForgetfulConfig(target_modules=["up"]))
        with pytest.raises(MethodContractError, match=r"'toyforgetful'.*missing \['blocks.0.up.w'\]"):
            model.parameter_groups(lr=0.1)

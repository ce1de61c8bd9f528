"""A failure at any point leaves the model as it was: what adapters may bring along, besides their own modules.

Sites around the model, a change of its build, request arguments, data to start from, shared tensors, other adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from feature_toys import ALL, BATCHES, BUILT, GATE, adapted, built, feature_toys, gated, net, plain, resting, two
from test_transactions import Interrupt, fail_at_call, fail_at_tensor_operation
from toys import digest

from peft_core import PeftModel, get_peft_model


@pytest.fixture(scope="module", autouse=True)
def _methods() -> Iterator[None]:
    with feature_toys():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> dict[str, Any]:
    made = {"all": adapted, "built": built}
    paths = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, make in made.items():
        make().save_pretrained(paths[name])
    return paths


def everything(model: Any) -> dict[str, Any]:
    """What `digest` says, and what these adapters may touch beside it."""
    found = digest(model)
    found["config"] = dict(vars(model.config))
    found["signature"] = str(inspect.signature(model.forward))
    found["hooks"] = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    found["gradients"] = [None if p.grad is None else id(p.grad) for p in model.parameters()]
    if isinstance(model, PeftModel):
        state = model._peft
        routing = state.routing
        found["routing"] = (routing.arguments, routing.known, routing.describes_calls, routing.default)
        found["sites"] = {path: (id(site), site.names()) for path, site in state.sites.items()}
        found["records"] = {n: (id(r), r.trainable, r.config, list(r.replaced)) for n, r in state.adapters.items()}
    return found


OPERATIONS: dict[str, tuple[Any, Any]] = {
    "make": (net, lambda model, paths: get_peft_model(model, ALL)),
    "make built": (net, lambda model, paths: get_peft_model(model, BUILT)),
    "calibrate": (net, lambda model, paths: get_peft_model(model, ALL, calibration=BATCHES)),
    "calibrate one more": (plain, lambda model, paths: model.add_adapter("c", ALL, calibration=BATCHES)),
    "add a gate": (plain, lambda model, paths: model.add_adapter("gate", GATE)),
    "activate a gate": (resting, lambda model, paths: model.set_adapter("gate")),
    "activate what a gate uses": (gated, lambda model, paths: model.set_adapter(["b", "a"])),
    "delete a gate": (gated, lambda model, paths: model.delete_adapter("gate")),
    "combine": (two, lambda model, paths: model.add_weighted_adapter(["default", "other"], [1, 2], "sum", "mean")),
    "load": (plain, lambda model, paths: model.load_adapter(paths["all"], "c")),
    "load anew": (net, lambda model, paths: PeftModel.from_pretrained(model, paths["all"])),
    "load built": (net, lambda model, paths: PeftModel.from_pretrained(model, paths["built"])),
    "reload": (adapted, lambda model, paths: model.load_adapter(paths["all"], "default", replace=True)),
    "delete": (two, lambda model, paths: model.delete_adapter("default")),
    "delete built": (built, lambda model, paths: model.delete_adapter("default")),
    "unload": (two, lambda model, paths: model.unload()),
    "unload built": (built, lambda model, paths: model.unload()),
    "unload gated": (gated, lambda model, paths: model.unload()),
}


@pytest.mark.parametrize("fail", [fail_at_call, fail_at_tensor_operation])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_or_nothing(operation: str, fail: Any, saved: dict[str, Any]) -> None:
    make, act = OPERATIONS[operation]
    act(make(), saved)  # imports and caches that are filled once
    model = make()
    before = everything(model)
    for point in range(1, 100_000):
        try:
            with fail(point):
                act(model, saved)
        except Interrupt:
            after = everything(model)
            wrong = [key for key in before if before[key] != after.get(key)]
            assert not wrong and before.keys() == after.keys(), f"a failure at point {point} left a trace in {wrong}"
        else:
            break
    assert point > 1 or fail is fail_at_tensor_operation
    twin = make()
    act(twin, saved)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]

"""Methods that act during training: parameter groups, and events around each step of an optimizer.

Events come from the optimizer itself, so they need no call in the training loop: gradients are complete (however many
batches were accumulated), clipped and unscaled, and a step that a loss scaler skips is no event.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import hook_results
from .errors import MethodContractError, PeftError
from .records import AdapterRecord, PeftState, state_of


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """See `PeftModel.parameter_groups`."""
    state = _state(model)
    groups: list[dict[str, Any]] = []
    grouped: set[int] = set()
    for name in state.active:
        record = state.adapters[name]
        named = {key: p for key, p in named_parameters(record).items() if p.requires_grad and id(p) not in grouped}
        if not named:
            continue
        asked = hook_results.call(
            record.method, "peft_param_groups", config=record.config, parameters=named, lr=lr, weight_decay=weight_decay
        )
        asked = [{"params": list(named.values())}] if asked is None else asked
        _check_groups(record, named, asked)
        groups += [{"lr": lr, "weight_decay": weight_decay, **group} for group in asked]
        grouped.update(id(parameter) for parameter in named.values())
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in grouped]
    if rest:
        groups.append({"lr": lr, "weight_decay": weight_decay, "params": rest})
    return groups


def named_parameters(record: AdapterRecord) -> dict[str, nn.Parameter]:
    """What an adapter trains, by the path of the site (and its part) and the tensor's name; each tensor once."""
    learned = {id(owner._parameters[key]): (owner, key) for owner, key in record.learned}
    found: dict[str, nn.Parameter] = {}
    for place, module in (*record.placed.items(), ("shared", record.shared)):
        for name, parameter in module.named_parameters():
            if learned.pop(id(parameter), None) is not None:
                found[f"{place}.{name}"] = parameter
    return found


def _check_groups(record: AdapterRecord, named: dict[str, nn.Parameter], groups: list[dict[str, Any]]) -> None:
    names = {id(parameter): name for name, parameter in named.items()}
    given = Counter(id(parameter) for group in groups for parameter in group["params"])
    twice = sorted({names.get(i, "a foreign tensor") for i, count in given.items() if count > 1})
    foreign = sum(i not in names for i in given)
    missing = sorted(names[i] for i in names.keys() - given.keys())
    if twice or foreign or missing:
        raise MethodContractError(
            f"The {record.method.label} returned groups from peft_param_groups that do not hold each tensor of adapter "
            f"{record.name!r} once: twice {twice}, missing {missing}, and {foreign} that are none of its own."
        )


class Drive:
    """The bond between a model and an optimizer: methods hear of its steps until `remove()`.

    `step` counts the optimizer's steps; set it when training is resumed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int | Callable[[], int]) -> None:
        self.step = 0 if callable(step) else step
        self._source = step if callable(step) else None
        self._model = weakref.ref(model)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._source is not None:
            self.step = self._source()
        self._tell("before", optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._tell("after", optimizer)
        self.step += 1

    def _tell(self, event: str, optimizer: torch.optim.Optimizer) -> None:
        model = self._model()
        state = state_of(model) if model is not None else None
        if model is None or state is None:
            return
        for name in state.active:
            record = state.adapters[name]
            if record.trainable and record.method.hook.peft_step.get_hookimpls():
                changed = hook_results.call(
                    record.method,
                    "peft_step",
                    model=model,
                    name=name,
                    config=record.config,
                    adapters=record.placed,
                    shared=record.shared,
                    event=event,
                    step=self.step,
                    optimizer=optimizer,
                )
                record.config = record.config if changed is None else changed

    def remove(self) -> None:
        """End it; the optimizer is as it was."""
        for hook in self._hooks:
            hook.remove()


_drives: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Drive]] = weakref.WeakKeyDictionary()
"""Weak both ways: what tells a step's number may refer to the optimizer. Its hooks keep the `Drive`."""


def drive(model: Any, optimizer: torch.optim.Optimizer, *, step: int | Callable[[], int] = 0) -> Drive:
    """Let the methods of a model's adapters act at each step of `optimizer`; one line, once, before training.

    transformers' `Trainer` does it by itself. `model` may be wrapped (DistributedDataParallel, a compiled model);
    `step` is the number of the next step (0-based), or a function that tells it. Driving an optimizer again replaces
    what was.

    Raises `PeftError` where the model has no adapters or `optimizer` is not a `torch.optim.Optimizer`.
    """
    while state_of(model) is None:
        wrapped = model._modules.get("_orig_mod", model._modules.get("module"))
        if wrapped is None:
            break
        model = wrapped
    _state(model)
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper steps the one inside
    if not isinstance(inner, torch.optim.Optimizer):
        raise PeftError(f"drive needs a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    before = _drives.get(inner)
    if before is not None and (old := before()) is not None:
        old.remove()
    made = Drive(model, inner, step)
    _drives[inner] = weakref.ref(made)
    return made


def _state(model: nn.Module) -> PeftState:
    state = state_of(model)
    if state is None:
        raise PeftError("this model has no adapters; make one with get_peft_model(model, config)")
    return state

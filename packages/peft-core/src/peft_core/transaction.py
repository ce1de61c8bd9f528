"""All or nothing: steps are taken back, in reverse, when an exception of any kind leaves the block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .records import AdapterRecord, PeftState


class Undo:
    """Takes back what was registered if its block is left by an exception (Ctrl-C and out-of-memory included)."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        """Register how to take back what comes next. Steps may run although the change never happened."""
        self._steps.append(step)

    def keep(self, mapping: dict[Any, Any]) -> None:
        """Register that a dictionary gets its present entries back, in their order."""
        entries = dict(mapping)

        def step() -> None:
            # Never empty in between: calls on other threads go on reading it.
            for key in mapping.keys() - entries.keys():
                del mapping[key]
            mapping.update(entries)
            if list(mapping) != list(entries):
                for key in entries:
                    mapping[key] = mapping.pop(key)

        self.add(step)

    def keep_state(self, state: PeftState) -> None:
        """Register that a model's record of its adapters, and who is active, come back."""
        for mapping in (state.__dict__, state.adapters, state.sites):
            self.keep(mapping)
        standing = state.routing.standing()  # calls that run on other threads go on as they are
        self.add(lambda: state.routing.__dict__.update(standing))
        unnested = list(state.unnested)
        self.add(lambda: state.unnested.__setitem__(slice(None), unnested))

    def keep_flags(self, record: AdapterRecord) -> None:
        """Register that an adapter's trainability comes back."""
        self.keep(record.__dict__)
        flags = [(parameter, parameter.requires_grad) for parameter in record.parameters()]
        self.add(lambda: _set_flags(flags))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            while self._steps:
                self._steps.pop()()


def overwrite(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy a value into each tensor: into all of them or, after an exception of any kind, into none."""
    with torch.no_grad(), Undo() as undo:  # taken back without a graph as well
        for tensor, value in values:
            undo.add(functools.partial(tensor.copy_, tensor.detach().clone()))
            tensor.copy_(value)


def _set_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)

"""`layer_replication`: a deeper model out of the layers that are there, each copy with adapters of its own.

Ranges of layers follow one another, [[0, 4], [2, 5]] making 0 1 2 3 2 3 4. Copies share their weights; an index that a
layer has of its own (for the cache of keys and values) is numbered anew. The base is as it was when the adapter goes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_core import Structure, TargetError, base_modules, role_paths


def replicated(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Structure:
    """The model's layers as the ranges say. Raises `TargetError` where the model's layers are not known."""
    path, layers = _layers(model)
    order = [index for start, stop in ranges for index in range(start, stop)]
    if not all(0 <= start < stop <= len(layers) for start, stop in ranges):
        raise TargetError(
            f"layer_replication: {[list(r) for r in ranges]} are not ranges of {path}, which has {len(layers)} layers "
            "(from the first number up to, and without, the second)"
        )
    made = nn.ModuleList(_twin(layers[index], number) for number, index in enumerate(order))
    made.train(layers.training)
    config: Any = getattr(model, "config", None)
    known = {"num_hidden_layers": len(order)} if hasattr(config, "num_hidden_layers") else {}
    if isinstance(kinds := getattr(config, "layer_types", None), (list, tuple)):
        known["layer_types"] = [kinds[index] for index in order]  # type: ignore[assignment]
    return Structure({path: made}, known)


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of layers: by its role, or by its length."""
    lists = {path: module for path, module in base_modules(model).items() if isinstance(module, nn.ModuleList)}
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [path for path in role_paths(model, "blocks") if path in lists]
    found = found or [path for path, module in lists.items() if len(module) == count]
    if len(found) != 1:
        raise TargetError(
            f"layer_replication: which modules are the layers of {type(model).__name__} is not clear"
            + (f" ({', '.join(found)})" if found else "; an extension can tell (peft_architectures, role `blocks`)")
        )
    return found[0], lists[found[0]]


def _twin(module: nn.Module, number: int) -> nn.Module:
    """A module of its own with the very parameters of another."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        twin.__dict__[name] = dict(module.__dict__[name])
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, number) for name, child in module._modules.items()
    }
    if isinstance(twin.__dict__.get("layer_idx"), int):
        twin.__dict__["layer_idx"] = number
    return twin

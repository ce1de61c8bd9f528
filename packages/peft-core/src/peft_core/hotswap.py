"""Hot swap: an adapter gets another one's values in place, so that compiled code and optimizers go on with its tensors.

The incoming adapter is built off the tree and compared with the present one, site by site; every value is made before
the first is written. Where both configs compute alike and shapes agree, values are copied; else the present adapter is
asked for values of its own tensors that compute the same (`Adapter.values_like`): padded ranks, scalings folded in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import layout
from .adapter import Adapter
from .adapter_file import AdapterFile, TensorsFile
from .config import AdapterConfig
from .errors import CheckpointMismatchError, PeftError
from .lifecycle import install, require_unmerged
from .loading import draft_from, opened, same_function
from .matching import LoadReport
from .methods import Method, load_method
from .planning import draft
from .records import AdapterRecord, PeftState, state_of
from .transaction import overwrite


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | torch.device | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> LoadReport:
    """Give an adapter of the model the values of a saved one, in place: no tensor, no module and no flag is replaced.

    Files are read as strictly as by `load_adapter`. The saved adapter may have a smaller rank, another scaling, and
    fewer sites, where its method can express that in the present one's tensors; the present config stays. `model` may
    be what `torch.compile` made of it; nothing is compiled again. Calls that run meanwhile on other threads may see a
    part of the new values: swap between requests.

    Raises `AdapterNotFoundError`, `CheckpointError`, and `CheckpointMismatchError` with all problems where the saved
    adapter cannot take the present one's place, with nothing changed.
    """
    inner = unwrapped(model)
    state, present = _present(inner, adapter_name)
    file, method, config = opened(
        inner, model_name_or_path, subfolder=subfolder, revision=revision, torch_device=torch_device
    )
    return _swap(inner, state, present, method, config, file, trusted=False)


def hotswap_adapter_from_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: AdapterConfig,
    parameter_prefix: str = "",
) -> LoadReport:
    """As `hotswap_adapter`, with tensors in memory, under the keys of files, and the config that they belong to.

    `parameter_prefix` is accepted from callers that pass it: names are compared whole here.
    """
    inner = unwrapped(model)
    state, present = _present(inner, adapter_name)
    file = TensorsFile(config.beside_tensors(), dict(state_dict), "the state dict")
    return _swap(inner, state, present, load_method(config.peft_type), config, file, trusted=True)


def rebuilt(model: nn.Module, adapter_name: str, config: AdapterConfig) -> None:
    """Replace an adapter by one of another config that computes the same: with room for larger ones, say.

    Its tensors are new ones; whether it is active and trains stays. Raises `CheckpointMismatchError` where the new one
    cannot compute the same.
    """
    state, present = _present(model, adapter_name)
    # Nothing is initialised: all of it gets values below.
    found = draft(model, adapter_name, config, method=present.method, trusted=False, tensors=lambda request: None)
    found.check()
    with torch.no_grad():
        for tensor, value in _values(found.record, present, same=False):
            tensor.copy_(value)
    active = state.active
    install(model, found, trainable=present.trainable, activate=False, instead=adapter_name)
    assert state.active == active


def unwrapped(model: Any) -> nn.Module:
    """The model itself, where `torch.compile` wrapped it."""
    if not isinstance(model, nn.Module):
        raise PeftError(f"hot swap is for an adapted model, not for a {type(model).__name__}")
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _present(model: nn.Module, name: str) -> tuple[PeftState, AdapterRecord]:
    state = state_of(model)
    if state is None:
        raise PeftError("hot swap replaces an adapter's values, and this model has no adapters; load one first")
    record = state.record(name)
    require_unmerged(state, "swapping an adapter")
    return state, record


def _swap(
    model: nn.Module,
    state: PeftState,
    present: AdapterRecord,
    method: Method,
    config: AdapterConfig,
    file: AdapterFile,
    *,
    trusted: bool,
) -> LoadReport:
    if method is not present.method:
        raise CheckpointMismatchError(
            f"{file.source}: it is an adapter of the {method.label}, and {present.name!r} is one of the "
            f"{present.method.label}; load it under another name"
        )
    found, report = draft_from(model, present.name, config, method, file, trusted=trusted)
    try:
        values = list(_values(present, found.record, same=same_function(present.config, config)))
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{file.source}: {error}") from None
    overwrite(values)
    return report


def _values(present: AdapterRecord, incoming: AdapterRecord, same: bool) -> list[tuple[Tensor, Tensor]]:
    """Every tensor of `present` with the value that makes it compute what `incoming` does, in its dtype and device.

    Raises `CheckpointMismatchError` with all problems.
    """
    problems, found = [], []
    given = incoming.placed
    for key in given.keys() - present.placed.keys():
        problems.append(f"{key}: the adapter on the model has no part there")
    for key, adapter in present.placed.items():
        try:
            found += _values_at(adapter, given.get(key), same)
        except CheckpointMismatchError as error:
            problems.append(str(error))
    shared, theirs = (dict(layout.persistent(record.shared)) for record in (present, incoming))
    if {k: v.shape for k, v in shared.items()} != {k: v.shape for k, v in theirs.items()} or (shared and not same):
        problems.append("tensors that its sites have in common are others, or are used in another way")
    if problems:
        raise CheckpointMismatchError(
            f"it cannot take the place of adapter {present.name!r}; nothing was changed:\n"
            + "\n".join(f"- {problem}" for problem in problems)
        )
    found += [(shared[name], theirs[name]) for name in shared]
    return [(tensor, value.detach().to(device=tensor.device, dtype=tensor.dtype)) for tensor, value in found]


def _values_at(adapter: Adapter, other: Adapter | None, same: bool) -> list[tuple[Tensor, Tensor]]:
    own = adapter.state()
    values: Mapping[str, Tensor]
    if (
        other is not None
        and same
        and {k: v.shape for k, v in other.state().items()} == {k: v.shape for k, v in own.items()}
    ):
        values = other.state()
    else:
        values = adapter.values_like(other)
    parts = [part for slot, value in values.items() for part in adapter.parts(slot, value)]
    return [(getattr(owner, name), value) for owner, name, value in parts]

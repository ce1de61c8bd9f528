"""Folding adapters into the base weights, and taking them out again bit for bit.

Sums are made in float32 (or wider, as the base is) and rounded once. The original parameters are kept as they
are, so that unmerging is putting them back; a tie between two modules is opened by merging into one of them and
closed again by unmerging.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import hook_results
from .errors import MergeError
from .layers import BaseLayer
from .planning import HALF
from .records import PeftState
from .site import Site
from .transaction import Undo


@torch.no_grad()
def merge(
    state: PeftState,
    names: tuple[str, ...],
    undo: Undo,
    *,
    progressbar: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Fold the adapters into their layers' weights, in order; returns the original parameters by site path.

    Raises `MergeError`, with every weight as it was, where a method has no merged form, where a result is not
    finite, or where a layer has no place for it (a bias it lacks).
    """
    snapshots: dict[str, dict[str, Tensor]] = {}
    ties: dict[int, list[tuple[BaseLayer, str, Tensor]]] = {}
    # As in a call, a module's own adapters act on the weights that those around it give.
    outermost_first = sorted(state.sites.items(), key=lambda item: item[0].count(".") + bool(item[0]))
    for path, site in _progress(outermost_first, progressbar):
        if not site.chain(names):
            continue
        layer = site._layer
        merged = _merged(state, site, path, names, arguments or {})
        if not merged:
            continue
        before = layer.snapshot(tuple(merged))
        undo.add(lambda layer=layer, before=before: layer.restore(before))  # type: ignore[misc]
        layer.write(merged)
        _warn_of_approximation(path, f"into a {type(layer.module).__name__}", layer.write_is_approximate)
        snapshots[path] = before
        for name, parameter in layer.snapshot(tuple(merged)).items():
            ties.setdefault(id(before[name]), []).append((layer, name, parameter))
    for members in ties.values():
        _tie_again(members)
    return snapshots


def unmerge(state: PeftState, undo: Undo) -> None:
    """Put the original parameters back."""
    for path, snapshot in reversed(state.snapshots.items()):
        layer = state.sites[path]._layer
        merged = layer.snapshot(tuple(snapshot))
        undo.add(lambda layer=layer, merged=merged: layer.restore(merged))  # type: ignore[misc]
        for name, tensor in snapshot.items():
            now = merged[name]
            if (tensor.dtype, tensor.device) != (now.dtype, now.device):  # the model was cast or moved meanwhile
                undo.add(lambda tensor=tensor, data=tensor.data: setattr(tensor, "data", data))  # type: ignore[misc]
                tensor.data = tensor.data.to(now)
        layer.restore(snapshot)


def _merged(
    state: PeftState, site: Site, path: str, names: tuple[str, ...], arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    layer = site._layer
    stored = layer.params()
    params = {n: p.float() if p.dtype in HALF else p for n, p in stored.items()}
    # A merge may give new values to buffers as well: a module that was trained in full has its own.
    buffers = dict(layer.module.named_buffers(remove_duplicate=False))
    before = {**buffers, **params}
    for name in names:
        record = state.adapters[name]
        for adapter in site.chain((name,)):
            params = hook_results.call(
                record.method,
                "peft_merge",
                config=record.config,
                adapter=adapter,
                params=dict(params),
                arguments=arguments,
            )
            _warn_of_approximation(path, type(adapter).__name__, adapter.merge_is_approximate)
    unknown = params.keys() - before.keys()
    if unknown:
        raise MergeError(
            f"{path}: merging gives {sorted(unknown)}, which {type(layer.module).__name__} does not have; keep the "
            "adapter attached, or give the layer such a parameter first"
        )
    changed = {n: p for n, p in params.items() if p is not before[n]}
    for name, value in changed.items():
        if value.shape != before[name].shape:
            raise MergeError(
                f"{path}.{name}: merging gives shape {tuple(value.shape)}, the layer has {tuple(before[name].shape)}"
            )
        dtype = (stored[name] if name in stored else buffers[name]).dtype
        if not torch.isfinite(value.to(dtype)).all():
            raise MergeError(
                f"{path}.{name}: the merged weight is not finite in {dtype}; look for NaN or infinite values in the "
                "adapter, or merge into a base of a wider dtype"
            )
    return changed


def _warn_of_approximation(path: str, what: str, why: str) -> None:
    if why:
        warnings.warn(
            f"{path}: merging {what} is an approximation: {why}. Outputs change; keep the adapter attached where that "
            "matters.",
            stacklevel=2,
        )


def _tie_again(members: list[tuple[BaseLayer, str, Tensor]]) -> None:
    """Modules that shared a parameter and come out equal go on sharing one."""
    first = members[0][2]
    if all(first.shape == other.shape and torch.equal(first, other) for _, _, other in members[1:]):
        for layer, name, _ in members[1:]:
            layer.restore({name: first})


def _progress(items: list[tuple[str, Site]], progressbar: bool) -> list[tuple[str, Site]]:
    if progressbar:
        from tqdm.auto import tqdm

        return tqdm(items, desc="Merging", unit="layer")  # type: ignore[no-any-return]
    return items


def names_to_merge(state: PeftState, names: Sequence[str] | None) -> tuple[str, ...]:
    """The adapters to merge: those named, or the active ones. Raises `AdapterNotFoundError`, `MergeError`."""
    chosen = state.active if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        state.record(name)
    if changed := [record.name for record in state.adapters.values() if record.structure is not None]:
        raise MergeError(
            f"adapter {changed[0]!r} came with a change of the model's build, so nothing can be merged: without it the "
            "model would be built as before"
        )
    if not chosen:
        raise MergeError("no adapter is active, so there is nothing to merge")
    return chosen

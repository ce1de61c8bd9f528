"""From an adapter's files to an adapter on a model: matched whole, then installed, or nothing changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, layout
from .adapter_file import AdapterFile, TensorsFile
from .adapter_names import check_name
from .banks import Seeded
from .config import AdapterConfig
from .errors import AdapterNameError, CheckpointError, CheckpointMismatchError
from .hook_results import call_extensions
from .layers import SiteRequest
from .lifecycle import check_references, install, require_unmerged
from .locating import WEIGHTS
from .matching import PREFIX, LoadReport, match
from .methods import Method, load_method
from .planning import META, Draft, build, draft
from .records import AdapterRecord, state_of
from .transaction import Undo


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    *,
    activate: bool,
    is_trainable: bool = False,
    replace: bool = False,
    strict: bool = True,
    config: AdapterConfig | None = None,
    autocast_adapter_dtype: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    torch_device: str | torch.device | None = None,
    low_cpu_mem_usage: bool = False,
) -> LoadReport:
    """Read, match, build and install one adapter; see `PeftModel.load_adapter`."""
    check_name(name)
    state = state_of(model)
    if state is not None:
        require_unmerged(state, "loading an adapter")
    present = state.adapters.get(name) if state else None
    if present is not None and not replace:
        raise AdapterNameError(
            f"adapter {name!r} is on the model already; choose another name, or pass replace=True to take its place"
        )
    file, method, resolved = opened(
        model,
        path,
        subfolder=subfolder,
        revision=revision,
        torch_device=torch_device,
        config=config,
        is_trainable=is_trainable,
    )
    check_references(state, name, resolved)
    if present is not None and present.method is method and same_function(present.config, resolved):
        expected = layout.collect(present)
        if {k: (tuple(v.shape)) for k, v in expected.items()} == {k: s for k, (s, _) in file.shapes.items()}:
            _refill(model, present, file)
            assert state is not None
            return LoadReport()
    found, report = draft_from(
        model,
        name,
        resolved,
        method,
        file,
        strict=strict,
        float32=autocast_adapter_dtype,
        trusted=config is not None,
    )
    instead = name if present is not None else None
    install(model, found, trainable=is_trainable, activate=activate and present is None, instead=instead)
    return report


def opened(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    subfolder: str | None,
    revision: str | None,
    torch_device: str | torch.device | None,
    config: AdapterConfig | None = None,
    is_trainable: bool = False,
) -> tuple[AdapterFile, Method, AdapterConfig]:
    """A saved adapter's file, method and config (or the one given instead of it)."""
    if torch_device is not None and torch.device(torch_device) != _device(model):
        raise CheckpointError(
            f"torch_device={str(torch_device)!r}: an adapter is loaded to where its layers are, {_device(model)}; move "
            "the model, or leave the argument out"
        )
    file = _read(model, path, subfolder, revision)
    method = load_method(file.method, wrote_by=file.wrote_by)
    if config is None:
        config = method.config_class.from_dict(file.config, source=str(file.source))
        config = config.resolve(inference_mode=not is_trainable)
    return file, method, config


def _read(model: nn.Module, path: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> AdapterFile:
    """The library's own files; where there are none, whatever an extension can make of the place."""
    place = Path(path) / (subfolder or "")
    if place.exists() and not (place / WEIGHTS).is_file():
        foreign = call_extensions("peft_checkpoint", path=place, model=model)
        if foreign is not None:
            config, tensors = foreign
            return TensorsFile(config, tensors, str(place))
    return checkpoint.read(path, subfolder=subfolder, revision=revision)


def draft_from(
    model: nn.Module,
    name: str,
    config: AdapterConfig,
    method: Method,
    file: AdapterFile,
    *,
    strict: bool = True,
    float32: bool = True,
    trusted: bool,
) -> tuple[Draft, LoadReport]:
    """A saved adapter, built off the tree with the file's tensors in it."""
    tensors = _by_module(file.shapes)

    def tensors_for(request: SiteRequest) -> Mapping[str, Tensor]:
        start = request.key_prefix
        found = tensors.get(request.path, {})
        if start.startswith("/"):  # keys that begin anew, without the path
            start, found = start[1:], tensors.get("", {})
        return {key[len(start) :]: value for key, value in found.items() if key.startswith(start)}

    found = draft(
        model, name, config, method=method, device=META, float32=float32, trusted=trusted, tensors=tensors_for
    )
    found.check()
    base = found.tree.parameters(every_name=True)  # a file may hold tied weights twice
    slots = layout.layout(found.record)
    expected = {key: slot.tensor for key, slot in slots.items()}
    keys, report = match(file, expected, strict=strict, base_names=base.keys())
    check_base(base, file, report)
    states: list[dict[str, Tensor]] = [{} for _ in found.record.adapters]
    if report.missing or report.mismatched:  # only where strict is off: what cannot be loaded gets its starting value
        found = draft(model, name, config, method=method, float32=float32, trusted=trusted)
        found.check()
        states = [dict(adapter.state()) for adapter in found.record.adapters]
    device = next((layer.device for layer in found.layers), _device(model))
    loaded = file.load(list(keys.values()), device)
    shared: dict[str, Tensor] = {}
    for key, theirs in keys.items():
        slot = slots[key]
        (shared if slot.index is None else states[slot.index])[slot.name] = loaded[theirs]
    _fill(model, found, states, shared, tensors_for)
    return found, report


def _fill(
    model: nn.Module,
    found: Draft,
    states: Sequence[Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    tensors_for: Callable[[SiteRequest], Any],
) -> None:
    """Put a file's tensors, by slot, into the adapters of a draft and into its shared module."""
    record = found.record
    for index, (layer, adapter, state) in enumerate(zip(found.layers, record.adapters, states, strict=True)):
        if layer.device.type != "meta" and any(t.is_meta for t in _unsaved(adapter)):
            # Tensors that no file holds (index tables and the like) have to be made where the layer is.
            adapter = build(record, layer, model, tensors_for(layer.request), initialise=False)
            record.adapters[index] = adapter
        adapter.load_state(state)
    for name, value in shared.items():
        owner_path, _, attribute = name.rpartition(".")
        owner = record.shared.get_submodule(owner_path)
        old: Tensor = getattr(owner, attribute)
        if isinstance(owner, Seeded):
            owner.check(value, record.name)
            continue
        value = value.to(dtype=old.dtype, device=value.device if old.is_meta else old.device)
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            owner._buffers[attribute] = value
    record.note_learned()


def _unsaved(module: nn.Module) -> list[Tensor]:
    return [
        b
        for m in module.modules()
        for n, b in m._buffers.items()
        if b is not None and n in m._non_persistent_buffers_set
    ]


def _refill(model: nn.Module, record: AdapterRecord, file: AdapterFile) -> None:
    """New values into the tensors that are there, by pointer: all of them or none."""
    slots = layout.layout(record)
    values = file.load(list(file.shapes), next((slot.tensor.device for slot in slots.values()), _device(model)))
    for key, slot in slots.items():
        slot.check(record, values[key])
    with Undo() as undo, torch.no_grad():
        for key, slot in slots.items():
            for tensor, value in slot.parts(record, values[key]):
                undo.add(lambda tensor=tensor, old=tensor.data: setattr(tensor, "data", old))  # type: ignore[misc]
                # A part of another tensor would keep the whole of it alive.
                value = value.clone() if value.numel() < values[key].numel() else value
                tensor.data = value.to(device=tensor.device, dtype=tensor.dtype)


def same_function(first: AdapterConfig, second: AdapterConfig) -> bool:
    """Whether two configs ask for the same computation of the same tensors, in whatever order names are given."""
    one, other = (
        {k: _unordered(v) for k, v in c.beside_tensors().items() if k not in checkpoint.EDITABLE}
        for c in (first, second)
    )
    return one == other


def _unordered(value: Any) -> Any:
    return sorted(value, key=repr) if isinstance(value, list) else value


def _by_module(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors (shapes only) by every module path they may belong to."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, (shape, _) in shapes.items():
        parts = key.removeprefix(PREFIX).split(".")
        empty = torch.empty(shape, device=META)
        for cut in range(len(parts)):
            found.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = empty
    return found


def check_base(base: Mapping[str, nn.Parameter], file: AdapterFile, report: LoadReport) -> None:
    """Base weights that a file carries along must be the ones the model has: a load touches one adapter only."""
    if not report.base_weights:
        return
    loaded = file.load(list(report.base_weights.values()), torch.device("cpu"))
    different = []
    for path, key in report.base_weights.items():
        mine = base.get(path)
        if (
            mine is None
            or mine.shape != loaded[key].shape
            or not (mine.is_meta or torch.equal(mine.detach().cpu().float(), loaded[key].to(mine.dtype).float()))
        ):
            has = "has none" if mine is None else tuple(mine.shape)
            different.append(f"{key} (file {tuple(loaded[key].shape)}, model {has})")
    if different:
        raise CheckpointMismatchError(
            f"{file.source}: the file carries base weights that differ from this model's: {', '.join(different)}. "
            "Loading an adapter never writes the base: load the base it was trained on (resize its embeddings first if "
            "they were), or copy these tensors into the model yourself"
        )


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

"""Calls on a model, or on files, that are no methods of `PeftModel`: names that users of the field know."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, status
from .adapter_file import TensorsFile
from .config import AdapterConfig
from .errors import CheckpointError, PeftError
from .layout import collect, layout
from .lifecycle import require_unmerged
from .loading import check_base
from .matching import LoadReport, match
from .model import NO_STATE, PeftModel, get_peft_model
from .transaction import overwrite
from .tree import walk


def inject_adapter_in_model(
    peft_config: AdapterConfig, model: nn.Module, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False
) -> Any:
    """`get_peft_model` with its arguments the other way round: adapters always go into the model itself."""
    return get_peft_model(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """A config from a file's content; its `peft_type` picks the class. Raises `ConfigError`, `MethodError`."""
    return AdapterConfig.from_dict(config_dict)


def get_peft_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """One adapter's tensors under the keys of its file.

    Their values are those of `state_dict`, the whole model's, where it is given (one that was gathered from several
    processes, say). Raises `CheckpointError` where it lacks one.
    """
    found = collect(_adapted(model)._peft.record(adapter_name))
    if state_dict is None:
        return found
    names: dict[int, list[str]] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
    values: dict[str, Tensor] = {}
    for key, tensor in found.items():
        name = next((name for name in names.get(id(tensor), ()) if name in state_dict), None)
        if name is None:
            raise CheckpointError(
                f"the state dict lacks {' or '.join(names.get(id(tensor), [key]))} of adapter {adapter_name!r}; give "
                "the whole model's, or leave it out"
            )
        values[key] = state_dict[name]
    return values


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", *, strict: bool = True
) -> LoadReport:
    """Write tensors, under the keys of a file, into an adapter that is on the model.

    `strict=False` takes what fits and reports the rest. Raises `CheckpointMismatchError`, with nothing changed.
    """
    state = _adapted(model)._peft
    require_unmerged(state, "set_peft_model_state_dict")
    record = state.record(adapter_name)
    slots = layout(record)
    expected = {key: slot.tensor for key, slot in slots.items()}
    given = TensorsFile({}, peft_model_state_dict, "the state dict")
    base = walk(model).parameters(every_name=True)
    keys, report = match(given, expected, strict=strict, base_names=base.keys())
    check_base(base, given, report)
    values = given.load(list(keys.values()), torch.device("cpu"))
    for key, theirs in keys.items():
        slots[key].check(record, values[theirs])
    parts = [part for key, theirs in keys.items() for part in slots[key].parts(record, values[theirs])]
    overwrite(parts)
    return report


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Raises as `PeftModel.load_adapter`."""
    with checkpoint.read(model_id, subfolder=subfolder, revision=revision) as file:
        return file.load(list(file.shapes), torch.device(device))


def get_layer_status(model: Any) -> list[status.TunerLayerStatus]:
    """`PeftModel.get_layer_status`."""
    return _adapted(model).get_layer_status()


def get_model_status(model: Any) -> status.TunerModelStatus:
    """`PeftModel.get_model_status`."""
    return _adapted(model).get_model_status()


def _adapted(model: Any) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise PeftError(NO_STATE)
    return model

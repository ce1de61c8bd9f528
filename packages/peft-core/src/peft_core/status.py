"""Reports: how many parameters train, and what state each layer and the model are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .records import PeftState
from .subclass import base_class

Irregular = Literal["irregular"]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, each tensor counted once."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    return trainable, total


def trainable_line(model: nn.Module) -> str:
    """The line `print_trainable_parameters` prints."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"


@dataclass(frozen=True)
class TunerLayerStatus:
    """State of one adapted module; dictionaries are by adapter name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class TunerModelStatus:
    """State of the model; "irregular" where the layers of one adapter disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def layer_status(state: PeftState) -> list[TunerLayerStatus]:
    """One entry per adapted module."""
    report = []
    for path, site in state.sites.items():
        names = list(site.names())
        tensors = {n: [t for a in site.of(n).values() for t in (*a.parameters(), *a.buffers())] for n in names}
        flags = {n: [p.requires_grad for a in site.of(n).values() for p in a.parameters()] for n in names}
        report.append(
            TunerLayerStatus(
                name=path,
                module_type=type(site.base_layer).__name__,
                enabled=state.enabled,
                active_adapters=[n for n in state.active if n in names],
                merged_adapters=[n for n in state.routing.merged if n in names],
                requires_grad={n: _one(found) for n, found in flags.items()},
                available_adapters=sorted(names),
                devices={n: sorted({t.device.type for t in found}) for n, found in tensors.items()},
            )
        )
    return report


def model_status(model: nn.Module, state: PeftState) -> TunerModelStatus:
    """The whole model."""
    trainable, total = count_parameters(model)
    records = state.adapters
    flags = {
        name: [t.requires_grad for a in record.adapters for t in a.parameters()] for name, record in records.items()
    }
    return TunerModelStatus(
        base_model_type=base_class(type(model)).__name__,
        adapter_model_type="PeftModel",
        peft_types={name: record.config.peft_type for name, record in records.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(state.sites),
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters=list(state.routing.merged),
        requires_grad={name: _one(found) for name, found in flags.items()},
        available_adapters=sorted(records),
        devices={name: sorted({t.device.type for t in record.tensors()}) for name, record in records.items()},
    )


def _one(flags: list[bool]) -> bool | Irregular:
    found = set(flags)
    if len(found) > 1:
        return "irregular"
    return found.pop() if found else False

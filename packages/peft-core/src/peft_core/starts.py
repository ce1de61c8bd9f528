"""Starting values that come from data, or from other adapters: asked for, and put over the usual ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import hook_results
from .adapter_file import all_finite
from .calibration import Batches, undisturbed
from .config import AdapterConfig
from .errors import ConfigError, TargetError
from .layers import BaseLayer
from .methods import Method
from .records import AdapterState


def calibrate(
    model: nn.Module,
    name: str,
    method: Method,
    config: AdapterConfig,
    layers: list[BaseLayer],
    batches: Iterable[Any],
) -> AdapterState | None:
    """What the method makes of data, before anything is built. Raises `ConfigError` where it makes nothing of any."""
    if not method.hook.peft_calibrate.get_hookimpls():
        raise ConfigError(
            f"calibration batches were given, but the {method.label} does not start from data; leave them out"
        )
    plugged = [layer for layer in layers if not layer.request.copied]
    with undisturbed(model):
        found: AdapterState | None = hook_results.call(
            method,
            "peft_calibrate",
            model=model,
            name=name,
            config=config,
            layers=plugged,
            batches=Batches(model, batches, name),
        )
    return found


Parts = Callable[[str, Tensor], Iterable[tuple[nn.Module, str, Tensor]]]


def put(
    values: Mapping[str, Tensor], slots: Mapping[str, tuple[nn.Module, str]], where: str, parts: Parts | None = None
) -> None:
    """Write values over what some slots hold.

    Raises `TargetError` for unknown slots, other shapes, and numbers that are not finite.

    `parts` is `Adapter.parts`; without it each slot is one tensor.
    """
    for slot, value in values.items():
        if slot not in slots:
            raise TargetError(f"{where}: the start has a tensor {slot!r}, and the adapter has {sorted(slots)}")
        owner, attribute = slots[slot]
        tensor: Tensor = getattr(owner, attribute)
        if tensor.shape != value.shape:
            raise TargetError(
                f"{where}.{slot}: the start has shape {tuple(value.shape)}, the adapter {tuple(tensor.shape)}"
            )
        if not all_finite(value):
            raise TargetError(f"{where}.{slot}: the start holds numbers that are not finite (NaN or infinity)")
        if not tensor.is_meta:
            with torch.no_grad():
                for inner, name, part in parts(slot, value) if parts else ((owner, attribute, value),):
                    getattr(inner, name).copy_(part)


def slots_of(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every tensor of a module: slot -> (owner, attribute)."""
    return {
        f"{prefix}.{name}" if prefix else name: (inner, name)
        for prefix, inner in module.named_modules()
        for name in (*inner._parameters, *inner._buffers)
    }


def unused(start: AdapterState, layers: list[BaseLayer]) -> Iterator[str]:
    """Values for sites that there are not."""
    known = {layer.request.key for layer in layers}
    for place in start.tensors:
        if place not in known:
            yield f"{place}: the start has tensors for it, but the config does not select it"

"""Looking at an allocation, and settling it by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_core.errors import PeftError
from peft_core.records import AdapterRecord, state_of

from .allocation import Allocation, settle
from .config import AdaLoraConfig
from .layers import AdaLora

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rank_history(model: nn.Module, adapter_name: str = "default") -> list[tuple[int, dict[str, int]]]:
    """(step, {path of the layer: rank}) for each step that pruned, since the adapter was made or loaded.

    Raises `PeftError` where the adapter is not an AdaLoRA, `AdapterNotFoundError` where there is none of the name.
    """
    return list(_parts(model, adapter_name)[1].history)


def plot_ranks(model: nn.Module, adapter_name: str = "default", *, ax: Axes | None = None) -> Axes:
    """Draw the rank of each layer over the steps as an image: one row a layer, darker where more is left.

    Needs matplotlib (`pip install peft-lora[plot]`). `ax` is drawn into where it is given; returns the axes.

    Raises `PeftError` where no step has pruned yet, and as `rank_history`.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise PeftError("plot_ranks needs matplotlib: pip install 'peft-lora[plot]'") from error
    record, allocation = _parts(model, adapter_name)
    history = allocation.history
    if not history:
        raise PeftError(f"adapter {adapter_name!r}: no step has pruned a rank yet, so there is nothing to draw")
    paths = list(history[0][1])
    config: Any = record.config
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 1 + 0.18 * len(paths)), layout="constrained")
    image = ax.pcolormesh(
        [step for step, _ in history],
        range(len(paths)),
        [[ranks[path] for _, ranks in history] for path in paths],
        shading="nearest",
        cmap="viridis_r",
        vmin=0,
        vmax=config.init_r,
    )
    ax.set_yticks(range(len(paths)), paths, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("step of the optimizer")
    ax.figure.colorbar(image, ax=ax, label="rank")
    return ax


def prune_ranks(
    model: nn.Module, adapter_name: str = "default", *, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """End the allocation now: cut every layer to the rows that are not zero, and return the ranks by path.

    The last of `total_step` steps does this by itself, but in trainings over several processes: call it there after
    the training, before saving. The tensors are new ones: give the `optimizer` that is to train them further.

    Raises as `rank_history`.
    """
    record, allocation = _parts(model, adapter_name)
    adapters = adapters_of(record)
    for adapter in adapters.values():
        adapter.forget()
    if record.config.rank_pattern is None:  # type: ignore[attr-defined]
        record.config = with_pattern(record.config, settle(adapters, optimizer))  # type: ignore[arg-type]
    allocation.settled = True
    return {path: adapter.lora_E.shape[0] for path, adapter in adapters.items()}


def with_pattern(config: AdaLoraConfig, kept: Mapping[str, tuple[bool, ...]]) -> AdaLoraConfig:
    """The config that says which rows of the first `init_r` the layers have."""
    resolved: AdaLoraConfig = config.resolve(rank_pattern={f"{path}.lora_E": rows for path, rows in kept.items()})
    return resolved


def adapters_of(record: AdapterRecord) -> dict[str, AdaLora]:
    """The layers of an adapter by path, without copies of whole modules (`modules_to_save`)."""
    both = zip(record.requests, record.adapters, strict=True)
    return {request.path: adapter for request, adapter in both if isinstance(adapter, AdaLora)}


def _parts(model: nn.Module, name: str) -> tuple[AdapterRecord, Allocation]:
    state = state_of(model)
    if state is None:
        raise PeftError("this model has no adapters; make one with get_peft_model(model, AdaLoraConfig(...))")
    record = state.record(name)
    if not isinstance(record.config, AdaLoraConfig):
        raise PeftError(f"adapter {name!r} is not an AdaLoRA, but {record.method.label}")
    allocation: Allocation = record.shared.__dict__["allocation"]
    return record, allocation


__all__ = ["plot_ranks", "prune_ranks", "rank_history"]

"""AdaLoRA: low-rank adapters in the form of a singular value decomposition, whose ranks are chosen during training.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
https://arxiv.org/abs/2303.10512. ΔW = P Λ Q (equation 3), here B diag(E) A. The hooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.errors import TargetError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, ConvLayer, is_conv1d
from peft_lora.settings import check_file

from .allocation import Allocation
from .config import AdaLoraConfig
from .history import with_pattern
from .layers import AdaLora

__all__ = ["AdaLora", "AdaLoraConfig"]


@hookimpl
def peft_config() -> type[AdaLoraConfig]:
    return AdaLoraConfig


@hookimpl
def peft_resolve(config: AdaLoraConfig, matched: Mapping[str, nn.Module]) -> AdaLoraConfig | None:
    """Other readers go by `fan_in_fan_out`: say there how the matched layers store their weights."""
    transposed = any(is_conv1d(module) for module in matched.values())
    linear = [path for path, module in matched.items() if isinstance(module, nn.Linear)]
    if config.fan_in_fan_out and linear and not transposed:
        warnings.warn(
            f"fan_in_fan_out=True, but {linear[0]} stores its weight as (out, in). How a layer stores its weight is "
            "seen from the layer; the setting is taken as False.",
            stacklevel=2,
        )
    if config.fan_in_fan_out == transposed or not (transposed or linear):
        return None
    return config.resolve(fan_in_fan_out=transposed)


@hookimpl
def peft_prepare(config: AdaLoraConfig, layers: Sequence[BaseLayer], shared: nn.Module, trusted: bool) -> None:
    pattern = config.rank_pattern or {}
    if trusted:
        if config.target_r > config.init_r:
            raise TargetError(
                f"target_r={config.target_r} is more than init_r={config.init_r}: ranks only fall; raise init_r"
            )
        paths = {f"{layer.path}.lora_E" for layer in layers}
        if vain := [key for key in pattern if key not in paths]:
            raise TargetError(f"rank_pattern: {vain} are none of the adapted layers")
    shared.__dict__["allocation"] = Allocation(len(layers), settled=bool(pattern))


@hookimpl
def peft_build(
    config: AdaLoraConfig, layer: BaseLayer, shared: nn.Module, tensors: Mapping[str, Tensor] | None
) -> AdaLora:
    if isinstance(layer, ConvLayer):
        if layer.groups > 1:
            raise layer.refuse(
                f"its convolution has {layer.groups} groups, and AdaLoRA's A reads all input channels; exclude it"
            )
    elif layer.kind != "linear":
        raise layer.refuse("AdaLoRA adapts linear layers and convolutions; exclude this one")
    rows = (config.rank_pattern or {}).get(f"{layer.path}.lora_E")
    rank = config.init_r if rows is None else sum(rows)
    check_file(layer, tensors, "lora_A", rank)
    return AdaLora(layer, config, shared.__dict__["allocation"], rank, tensors)  # type: ignore[arg-type]


@hookimpl
def peft_step(
    config: AdaLoraConfig,
    adapters: Mapping[str, Adapter],
    shared: nn.Module,
    event: str,
    step: int,
    optimizer: torch.optim.Optimizer,
) -> AdaLoraConfig | None:
    """Importance from the gradients, pruning after the update: where HF PEFT's loops call `update_and_allocate`."""
    allocation: Any = shared.__dict__["allocation"]
    own = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, AdaLora)}
    assert config.total_step is not None
    if event == "before":
        final = allocation.settled or step > config.total_step - config.tfinal
        if final and config.rank_pattern is None:
            allocation.note_pruned(own)
        return None
    kept = allocation.act(config, own, step, optimizer)
    return None if kept is None else with_pattern(config, kept)

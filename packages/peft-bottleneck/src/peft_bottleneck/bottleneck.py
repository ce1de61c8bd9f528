"""The hooks of bottleneck adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from peft_core import Adapter, BaseLayer, SiteRequest, hookimpl

from .adapters import OutputAdapter, ResidualAdapter, ResidualRecorder, SumAdapter
from .config import BottleneckConfig
from .places import OUTPUT, RECORDER, STREAM, SUM, requests


@hookimpl
def peft_config() -> type[BottleneckConfig]:
    return BottleneckConfig


@hookimpl
def peft_resolve(config: BottleneckConfig) -> BottleneckConfig:
    """The style's values are written out, so that a file says all that it means."""
    return config.complete()


@hookimpl
def peft_sites(config: BottleneckConfig, model: nn.Module) -> Sequence[SiteRequest]:
    return requests(config, model) if config.target_modules is None else []


@hookimpl
def peft_build(config: BottleneckConfig, layer: BaseLayer, model: nn.Module) -> Adapter:
    meta = layer.request.meta
    form = meta.get("form", OUTPUT)
    if form == RECORDER:
        return ResidualRecorder(layer)
    width = _width(layer, model, chosen="form" in meta)
    size = max(1, int(width // config.factor(meta.get("number", 0))))
    if form == SUM:
        return SumAdapter(layer, config, width, size)
    if form == OUTPUT:
        return OutputAdapter(layer, config, width, size)
    return ResidualAdapter(layer, config, width, size, meta["source"], summed=form == STREAM, last=meta["last"])


def _width(layer: BaseLayer, model: nn.Module, *, chosen: bool) -> int:
    """How many features the module's output has. Raises `TargetError`."""
    if layer.kind == "linear":
        return int(layer.out_features)  # type: ignore[attr-defined]
    if chosen and len(layer.shape) == 1 and layer.shape[0]:  # a norm
        return layer.shape[0]
    config = getattr(model, "config", None)
    found = config.get("hidden_size") if isinstance(config, Mapping) else getattr(config, "hidden_size", None)
    if chosen and isinstance(found, int):
        return found
    raise layer.refuse("a bottleneck adapter sits behind linear layers, and how wide this output is cannot be known")

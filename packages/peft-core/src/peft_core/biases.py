"""Trained biases of the base, for methods whose config has `bias="none" | "all" | "<method>_only"`.

The base keeps its biases; the adapter has others, which act while it is active. Use in a plugin:

    @hookimpl
    def peft_sites(config, model, matched):
        return bias_sites(config, model, matched)

    @hookimpl
    def peft_build(config, layer, ...):
        if is_bias(layer):
            return own_bias(layer)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter, DeltaAdapter, WeightAdapter, as_compute
from .config import TargetedConfig
from .layers import BaseLayer, ConvLayer, LinearLayer, Params, SiteRequest
from .patterns import NameMatcher
from .targets import TASK_HEADS
from .tree import walk

_MARK = "own bias"


def bias_sites(config: TargetedConfig, model: nn.Module, adapted: Collection[str]) -> list[SiteRequest]:
    """A site for each bias that `config.bias` means: "none", "all" of the model's, or those of the `adapted` layers.

    Files have the biases of adapted layers one level further in. Modules that are trained in full are left out: they
    have their biases already.
    """
    choice: str = getattr(config, "bias", "none")
    return [] if choice == "none" else list(_sites(config, model, set(adapted), choice == "all"))


def is_bias(layer: BaseLayer) -> bool:
    """Whether `bias_sites` asked for this layer."""
    return bool(layer.request.meta.get(_MARK))


def own_bias(layer: BaseLayer) -> Adapter:
    """The adapter of the bias that `layer.request.names` names."""
    if isinstance(layer, (LinearLayer, ConvLayer)):
        return BiasShift(layer)
    return BiasReplaced(layer)


class BiasShift(DeltaAdapter):
    """b' on a linear layer or a convolution, as the difference b' - b on the output: no order among adapters."""

    by_values = True

    def __init__(self, layer: LinearLayer | ConvLayer) -> None:
        super().__init__(layer)
        stored = layer.module.get_parameter("bias")
        self.bias = layer.parameter(*stored.shape)
        self.channels = (-1, *(1,) * (len(layer.kernel_size) if isinstance(layer, ConvLayer) else 0))

    def reset_parameters(self) -> None:
        _copy(self.bias, self.layer, "bias")

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        return out + as_compute(self._shift(), out).view(self.channels)

    def delta(self, x: Tensor) -> Tensor:
        return as_compute(self._shift(), x).view(self.channels)

    def merge(self, params: Params) -> Params:
        return {**params, "bias": params["bias"] + self._shift().to(params["bias"].dtype)}

    def _shift(self) -> Tensor:
        return self.bias - self.layer.module.get_parameter("bias").to(self.bias.dtype)


class BiasReplaced(WeightAdapter):
    """b' of any other module, which computes with it in its own way."""

    by_values = True

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        (self.name,) = layer.request.names
        self.bias = layer.parameter(*layer.module.get_parameter(self.name).shape)

    def reset_parameters(self) -> None:
        _copy(self.bias, self.layer, self.name)

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return {self.name.rpartition(".")[2]: (self, "bias")}

    def merge(self, params: Params) -> Params:
        below = params[self.name]
        shift = self.bias - self.layer.module.get_parameter(self.name).to(self.bias.dtype)
        return {**params, self.name: below + shift.to(below.dtype)}


def _copy(bias: Tensor, layer: BaseLayer, name: str) -> None:
    stored = layer.module.get_parameter(name)
    if not (stored.is_meta or bias.is_meta):
        bias.copy_(stored)


def _sites(config: TargetedConfig, model: nn.Module, adapted: set[str], whole: bool) -> Iterator[SiteRequest]:
    names = (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type or "", ()))
    copied = NameMatcher(names, what="modules_to_save", trusted=False) if names else None
    modules: dict[int, tuple[str, nn.Module]] = {}
    for path, module in walk(model).modules:
        modules.setdefault(id(module), (path, module))
    # An attention's output projection is read by the attention's kernel, past any wrapper of its own.
    inner = {id(m.out_proj) for _, m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    meta: dict[str, Any] = {_MARK: True}
    for path, module in modules.values():
        if id(module) in inner or not (whole or path in adapted):
            continue
        if copied is not None and any(copied.matches(end) for end in _above(path)):
            continue
        level = "base_layer." if path in adapted else ""
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_bias is not None:
                yield SiteRequest(path, "in_proj_bias", ("in_proj_bias",), level, meta)
                yield SiteRequest(path, "out_proj_bias", ("out_proj.bias",), f"{level}out_proj.{level}", meta)
        elif module._parameters.get("bias") is not None:
            yield SiteRequest(path, "bias", ("bias",), level, meta)


def _above(path: str) -> Iterator[str]:
    """The path and those of the modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]

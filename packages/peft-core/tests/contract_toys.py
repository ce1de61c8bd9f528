"""Toy methods for the contract suite's own test: right ones, and ones that each break one promise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import Adapter, BaseLayer, DeltaAdapter, TargetedConfig, WeightAdapter, hookimpl
from peft_core.adapter import as_compute
from peft_core.layers import LinearLayer, Params
from peft_core.site import Link


class ToyConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOY"

    r: int = 4


class LowRank(DeltaAdapter):
    """Right: y = base(x) + x A B, starting from B = 0."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer)
        if not isinstance(layer, LinearLayer):
            raise layer.refuse("the toy adapts linear layers")
        self.down = layer.parameter(layer.in_features, config.r)
        self.up = layer.parameter(config.r, layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)

    def delta(self, x: Tensor) -> Tensor:
        return x @ as_compute(self.down, x) @ as_compute(self.up, x)

    def weight_delta(self) -> Tensor:
        return (self.down @ self.up).t()


class Gain(WeightAdapter):
    """Right: the rows of the weight and the bias, rescaled; with a forward of its own."""

    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer)
        if not isinstance(layer, LinearLayer):
            raise layer.refuse("the toy adapts linear layers")
        self.gain = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def merge(self, params: Params) -> Params:
        merged = {**params, "weight": params["weight"] * as_compute(self.gain, params["weight"])[:, None]}
        if "bias" in params:
            merged["bias"] = params["bias"] * as_compute(self.gain, params["bias"])
        return merged


class Doubling(LowRank):
    """Right, and a trap: it has a delta, but its forward is more than base and delta."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(base, *args, **kwargs)

    def merge(self, params: Params) -> Params:
        return {name: 2 * tensor for name, tensor in super().merge(params).items()}

    starts_as_base = False


class Centred(LowRank):
    """Right, if it says `rowwise = False`: a row's output depends on the other rows."""

    rowwise = False

    # Not by `delta`: at linear layers that sees all rows and positions as one list.
    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        return base(x) + self.delta(x - x.mean(0, keepdim=True))

    def merge(self, params: Params) -> Params:
        return Adapter.merge(self, params)


# -- each of these breaks one promise ----------------------------------------------------------------------------


class MergesInPlace(LowRank):
    def merge(self, params: Params) -> Params:
        params["weight"].add_(self.weight_delta())
        return params


class MergesWrongly(LowRank):
    def weight_delta(self) -> Tensor:
        return 1.01 * super().weight_delta()


class LosesInner(Gain):
    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self.layer.call(self.merge(self.layer.params()), *args, **kwargs)


class ClaimsToBeAdditive(Doubling):
    pass


ClaimsToBeAdditive.additive = True


class CutsGradient(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return x @ as_compute(self.down.detach(), x) @ as_compute(self.up, x)


class Remembers(LowRank):
    calls = 0

    def delta(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().delta(x) * self.calls


class MixesRows(Centred):
    rowwise = True


class ForgetsToSave(LowRank):
    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        super().__init__(layer, config)
        self.__dict__["mask"] = torch.rand(config.r, dtype=torch.float64)

    def delta(self, x: Tensor) -> Tensor:
        return (x @ as_compute(self.down * self.mask, x)) @ as_compute(self.up, x)

    def weight_delta(self) -> Tensor:
        return ((self.down * self.mask) @ self.up).t()


class WritesIntoTheBase(LowRank):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.layer.weight.mul_(1.01)


class CastsUp(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return x.to(self.down.dtype) @ self.down @ self.up


class BranchesOnValues(LowRank):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) if bool(x.sum() > 0) else super().delta(x) * 1


class StartsSomewhere(LowRank):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.normal_(self.up)


class TakesAnyLayer(LowRank):
    def __init__(self, layer: BaseLayer, config: ToyConfig) -> None:
        Adapter.__init__(self, layer)
        self.down = layer.parameter(1, 1)
        self.up = layer.parameter(1, 1)


class Plugin:
    """A method made of one adapter class."""

    def __init__(self, adapter_class: type[Adapter], **keys: str) -> None:
        self.adapter_class = adapter_class
        self.keys = keys

    @hookimpl
    def peft_config(self) -> type[ToyConfig]:
        return ToyConfig

    @hookimpl
    def peft_build(self, config: ToyConfig, layer: BaseLayer) -> Adapter:
        made: Any = self.adapter_class
        adapter: Adapter = made(layer, config)
        return adapter

    @hookimpl
    def peft_state_key(self, key: str) -> str:
        return self.keys.get(key, key)


PLUGINS = SimpleNamespace(
    colliding_keys=Plugin(LowRank, down="factor", up="factor"),
    **{
        name: Plugin(value)
        for name, value in list(globals().items())
        if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == __name__
    },
)

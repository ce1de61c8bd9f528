"""Toy methods that are combined, gated and chosen per row in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import Adapter, AdapterState, DeltaAdapter, TargetedConfig, WeightAdapter
from tests.toy_plugins import plugin

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


class RankConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYLOW"
    r: int = 2


class Low(DeltaAdapter):
    """Low-rank; has a form for rows with different adapters, if their ranks are equal."""

    batched: ClassVar[list[int]] = []

    def __init__(self, layer: Any, config: RankConfig) -> None:
        super().__init__(layer)
        self.a = layer.parameter(config.r, layer.in_features)
        self.b = layer.parameter(layer.out_features, config.r)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.a)
        nn.init.zeros_(self.b)

    def delta(self, x: Tensor) -> Tensor:
        return x @ self.a.t() @ self.b.t()

    def weight_delta(self) -> Tensor:
        return self.b @ self.a

    @classmethod
    def forward_rows(cls, adapters: Sequence[Low], index: Tensor, base: Any, *args: Any, **kwargs: Any) -> Any:
        if len({len(adapter.a) for adapter in adapters}) > 1:
            return NotImplemented
        cls.batched.append(len(adapters))
        (x,) = args
        flat = x.reshape(len(x), -1, x.shape[-1])
        a = torch.stack([adapter.a for adapter in adapters])[index]
        b = torch.stack([adapter.b for adapter in adapters])[index] * (index >= 0)[:, None, None]
        out = base(x)
        return out + (flat @ a.mT @ b.mT).reshape(out.shape)


class GainConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYGAIN2"


class Gain(Adapter):
    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs) * self.gain


class DenseConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TOYDENSE"


class Dense(WeightAdapter):
    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.diff = layer.parameter(layer.out_features, layer.in_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.diff)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**params, "weight": params["weight"] + self.diff}


def sum_of_deltas(sources: Sequence[Any], how: str, config: Any, options: Mapping[str, Any]) -> AdapterState | None:
    """A dense adapter from whatever has a `weight_delta`."""
    if how != "sum":
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for source in sources:
        for path, adapter in source.adapters.items():
            delta = options.get("scale", 1.0) * source.weight * adapter.weight_delta()
            diff = found.get(path, {"diff": torch.zeros_like(delta)})["diff"]
            found[path] = {"diff": diff + delta}
    return AdapterState(config or DenseConfig(target_modules=list(found)), found)


class MixConfig(TargetedConfig):
    """A row's output depends on the rest of its batch."""

    peft_type: ClassVar[str] = "TOYBATCH"


class Mix(Gain):
    rowwise = False

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return out + self.gain * out.mean(0, keepdim=True)


class GateConfig(TargetedConfig):
    """A gate over trained adapters, by a layer's input."""

    peft_type: ClassVar[str] = "TOYMOLE"
    experts: tuple[str, ...] = ()

    def refers_to(self) -> Sequence[str]:
        return self.experts


class Gate(Adapter):
    def __init__(self, layer: Any, config: GateConfig) -> None:
        super().__init__(layer)
        self.experts = config.experts
        self.gate = layer.parameter(len(config.experts), layer.in_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        out = base(x)
        gates = (x @ self.gate.t()).softmax(-1)
        return sum(gates[..., i, None] * base.through(name, x, out=out) for i, name in enumerate(self.experts))


PLUGINS = (
    plugin(RankConfig, Low, peft_combine=sum_of_deltas),
    plugin(GainConfig, Gain),
    plugin(DenseConfig, Dense, peft_combine=sum_of_deltas),
    plugin(MixConfig, Mix),
    plugin(GateConfig, Gate),
)

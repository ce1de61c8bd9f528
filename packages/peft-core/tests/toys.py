"""Small methods and models for the core's own tests, which run with no plugin installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import (
    Adapter,
    DeltaAdapter,
    PeftModel,
    TargetedConfig,
    WeightAdapter,
    hookimpl,
    register_method,
    unregister_method,
)


class SumConfig(TargetedConfig):
    """Adds u vᵀ to the weight."""

    peft_type: ClassVar[str] = "TOYSUM"
    scale: float = 1.0


class SumAdapter(DeltaAdapter):
    def __init__(self, layer: Any, config: SumConfig) -> None:
        super().__init__(layer)
        if layer.kind != "linear":
            raise layer.refuse("only linear layers")
        self.scale = config.scale
        self.u = layer.parameter(layer.out_features)
        self.v = layer.parameter(layer.in_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.u)
        nn.init.normal_(self.v)

    def delta(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.v.to(x.dtype)).unsqueeze(-1) * self.u.to(x.dtype)

    def weight_delta(self) -> Tensor:
        return self.scale * torch.outer(self.u, self.v)


class GainConfig(TargetedConfig):
    """Multiplies a layer's output."""

    peft_type: ClassVar[str] = "TOYGAIN"


class GainAdapter(Adapter):
    def __init__(self, layer: Any, config: GainConfig) -> None:
        super().__init__(layer)
        self.gain = layer.parameter(layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return out * self.gain.to(out.dtype)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = {**params, "weight": params["weight"] * self.gain[:, None]}
        if "bias" in params:
            merged["bias"] = params["bias"] * self.gain
        return merged


class ShiftConfig(TargetedConfig):
    """A weight-space method: adds a scalar to every weight of a module, whatever it is."""

    peft_type: ClassVar[str] = "TOYSHIFT"


class ShiftAdapter(WeightAdapter):
    def __init__(self, layer: Any, config: ShiftConfig) -> None:
        super().__init__(layer)
        self.shift = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + self.shift.to(value.dtype) for name, value in params.items()}


class MixConfig(TargetedConfig):
    """Mixes rows of a batch and cannot be merged."""

    peft_type: ClassVar[str] = "TOYMIX"


class MixAdapter(Adapter):
    rowwise = False

    def __init__(self, layer: Any, config: MixConfig) -> None:
        super().__init__(layer)
        self.mix = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mix)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return out + self.mix * out.mean(0, keepdim=True)


PAIRS = [
    (SumConfig, SumAdapter),
    (GainConfig, GainAdapter),
    (ShiftConfig, ShiftAdapter),
    (MixConfig, MixAdapter),
]


def plugin(config_class: Any, adapter_class: Any) -> Any:
    @hookimpl
    def peft_config() -> Any:
        return config_class

    @hookimpl
    def peft_build(config: Any, layer: Any) -> Any:
        return adapter_class(layer, config)

    return SimpleNamespace(peft_config=peft_config, peft_build=peft_build)


@contextmanager
def toys() -> Iterator[None]:
    """Register the toy methods for a while."""
    for config_class, adapter_class in PAIRS:
        register_method(plugin(config_class, adapter_class), replace=True)
    try:
        yield
    finally:
        for config_class, _ in PAIRS:
            unregister_method(config_class.peft_type.lower())


class Block(nn.Module):
    def __init__(self, width: int, checkpoint: str | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.checkpoint = checkpoint

    def _inner(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self._inner(x)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self._inner, x, use_reentrant=self.checkpoint == "reentrant")


class Net(nn.Module):
    """Embedding, two blocks, a tied head or a classifier."""

    def __init__(self, width: int = 8, vocabulary: int = 11, checkpoint: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width, checkpoint) for _ in range(2)])
        self.classifier = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def net(seed: int = 0, **kwargs: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**kwargs)


def randomise(model: Any, name: str = "default", seed: int = 1, std: float = 0.3) -> None:
    """Give an adapter values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft.adapters[name].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std)


def digest(model: nn.Module) -> dict[str, Any]:
    """Everything a failed operation must leave alone."""
    state = model._peft if isinstance(model, PeftModel) else None
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "tensors": [
            (name, id(tensor), tensor._version, tensor.requires_grad, tensor.data_ptr())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        ],
        "modes": [module.training for module in model.modules()],
        "class": type(model),
        "state": state and (state.active, state.enabled, state.routing.merged, sorted(state.adapters)),
    }

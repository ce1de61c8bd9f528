"""A toy method that brings along whatever a method may, and models in every state of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from toys import Block, SumConfig, plugin, randomise, toys

from peft_core import (
    Adapter,
    AdapterState,
    Seeded,
    SiteRequest,
    Structure,
    TargetedConfig,
    get_peft_model,
    hookimpl,
    register_method,
    unregister_method,
)

WIDTH = 4
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(3, dtype=torch.long)
BATCHES = ({"x": X, "labels": Y}, {"x": X + 1, "labels": Y})


class AllConfig(TargetedConfig):
    """Asks for everything: `build` replaces the second block, `others` are adapters that this one trains and uses."""

    peft_type: ClassVar[str] = "TOYALL"
    request_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)
    trains_referred: ClassVar[bool] = True
    build: bool = False
    others: tuple[str, ...] = ()

    def refers_to(self) -> tuple[str, ...]:
        return self.others


class AllAdapter(Adapter):
    """A gain for each task, a table of numbers from a seed, and what other adapters add."""

    def __init__(self, layer: Any, config: AllConfig) -> None:
        super().__init__(layer)
        self.config = config
        self.gain = layer.parameter(2, 1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        if self.layer.path:
            for name in self.config.others:
                out = base.through(name, *args, out=out, **kwargs)
            gain = self.gain[base.call.rows("task_ids", len(out))]
            return out * gain.view(-1, *[1] * (out.dim() - 1)) + self.shared.bias
        out["logits"] = out["logits"] * self.gain[0] + self.shared.bank.value[0]
        return out

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * self.gain[0, 0] for name, value in params.items()}

    def losses(self) -> dict[str, Tensor]:
        return {"small": self.gain.square().sum()}


@hookimpl
def peft_structure(config: AllConfig, model: Any) -> Structure | None:
    return Structure({"layers.1": copy.deepcopy(model.layers[0])}, {"blocks": 3}) if config.build else None


@hookimpl
def peft_sites() -> list[SiteRequest]:
    return [SiteRequest("")]


@hookimpl
def peft_prepare(shared: nn.Module, layers: Any) -> None:
    shared.bias = layers[0].parameter(1)
    nn.init.zeros_(shared.bias)
    shared.bank = Seeded((2, 1), seed=3)


@hookimpl
def peft_calibrate(config: AllConfig, layers: Any, batches: Any) -> AdapterState:
    chosen = [layer for layer in layers if layer.path]
    found: dict[str, dict[str, Tensor]] = {}
    for seen, gradients in zip(batches.inputs(chosen), batches.gradients(chosen), strict=True):
        for layer in chosen:
            value = seen[layer.path].mean() + gradients[layer.path].mean()
            found[layer.path] = {"gain": value.expand(2, 1)}
    return AdapterState(config, found, {"bias": torch.ones(1)})


@hookimpl
def peft_combine(sources: Any, how: str) -> AdapterState | None:
    if how != "mean":
        return None
    parts = {p: sum(s.weight * s.adapters[p].gain for s in sources) for p in sources[0].adapters}
    return AdapterState(sources[0].config, {path: {"gain": gain} for path, gain in parts.items()})


@contextmanager
def feature_toys() -> Iterator[None]:
    """Register the method, and the toys that it uses, for a while."""
    made = plugin(AllConfig, AllAdapter)
    made.peft_structure, made.peft_sites, made.peft_prepare = peft_structure, peft_sites, peft_prepare
    made.peft_calibrate, made.peft_combine = peft_calibrate, peft_combine
    with toys():
        name = register_method(made, replace=True).name
        yield
        unregister_method(name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(blocks=2)
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        found = {"logits": x}
        return found if labels is None else {"loss": nn.functional.cross_entropy(x, labels), **found}


def net() -> Any:
    torch.manual_seed(0)
    return Net()


ALL = AllConfig(target_modules=["down"])
BUILT = AllConfig(target_modules=["down"], build=True)
GATE = AllConfig(target_modules=["down"], others=("a", "b"))


def plain() -> Any:
    model = get_peft_model(net(), SumConfig(target_modules=["up", "down"]), "a")
    model.add_adapter("b", SumConfig(target_modules=["down"]))
    randomise(model, "a")
    randomise(model, "b")
    return model


def adapted() -> Any:
    model = get_peft_model(net(), ALL)
    randomise(model)
    return model


def built() -> Any:
    model = get_peft_model(net(), BUILT)
    randomise(model)
    return model


def gated() -> Any:
    model = plain()
    model.add_adapter("gate", GATE)
    model.set_adapter("gate")
    return model


def resting() -> Any:
    model = gated()
    model.set_adapter("a")
    return model


def two() -> Any:
    model = adapted()
    model.add_adapter("other", ALL)
    return model

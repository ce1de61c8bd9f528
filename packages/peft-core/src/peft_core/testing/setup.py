"""What the author of a method tells the suite, and how the suite makes its models."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core.config import AdapterConfig
from peft_core.methods import register_method, unregister_method
from peft_core.model import get_peft_model
from peft_core.records import AdapterRecord, PeftState

from .checks import promised
from .models import TinyNet, seeded


class Setup:
    """Everything here may be overridden; only `config` must be."""

    config: ClassVar[AdapterConfig]
    """The config to prove. Sizes that fit layers of 8, 12, 16 and 24 features; no dropout."""

    layer_kinds: ClassVar[Collection[str]] = ("linear",)
    """Kinds of layers the method adapts (see `peft_core.testing.KINDS`); all others it must refuse."""

    refused_cases: ClassVar[Collection[str]] = ()
    """Cases (see `peft_core.testing.CASES`) of those kinds that the method refuses all the same."""

    mergeable: ClassVar[bool] = True
    """Whether the method can be folded into the base weights; if not, it must refuse."""

    unmergeable_cases: ClassVar[Collection[str]] = ()
    """Cases whose merge the method refuses although it can merge others."""

    exact_gradients: ClassVar[bool] = True
    """Whether gradients are the derivative of the output; False where the method detaches something on
    purpose."""

    tolerance: ClassVar[float] = 1e-9
    """Largest relative difference between two ways to compute the same. The suite works in float64, where
    rounding is of the order of 1e-15 and a thousand additions stay below 1e-12; raise it only for maths that
    is itself an approximation."""

    neutral_at_start: ClassVar[bool] = True
    """Whether an adapter at its start also leaves adapters further in as they are; False where its start
    values are taken from the layer's own weights (their norms, say)."""

    siblings: ClassVar[Collection[str]] = ()
    """Modules of other methods that the method's module needs, for instance ("acme.other",)."""

    plugin: ClassVar[object | None] = None
    """The method's module or object where it is not installed: registered while a test runs."""

    def configure(self, targets: list[str]) -> AdapterConfig:
        """The config for a model whose modules of the method's kinds are `targets`."""
        return self.config.resolve(target_modules=targets)

    def randomize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Move a trained tensor away from its start, in place, as training would."""
        tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3)

    # -- for the tests ---------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _method_is_registered(self) -> Iterator[None]:
        if not isinstance(getattr(self, "config", None), AdapterConfig):
            pytest.fail(
                f"{type(self).__name__} gives no config; write `config = YourConfig(...)` in the class",
                pytrace=False,
            )
        if self.plugin is None:
            yield
            return
        method = register_method(self.plugin, replace=True)
        try:
            yield
        finally:
            unregister_method(method.name)

    def base(self, dtype: torch.dtype = torch.float64) -> TinyNet:
        """A fresh base model, always with the same weights."""
        model: TinyNet = seeded(TinyNet, dtype)
        return model

    def adapted(
        self,
        *names: str,
        base: nn.Module | None = None,
        random: bool = True,
        config: AdapterConfig | None = None,
    ) -> Any:
        """A model with these adapters (default: one, "a"), the first active, in eval mode.

        The same name always gets the same values, whatever else is on the model.
        """
        model = self.base() if base is None else base
        config = config or self.configure(TinyNet.targets(self.layer_kinds))
        for index, name in enumerate(names or ("a",)):
            with fixed_seed(name):
                if index:
                    model.add_adapter(name, config)  # type: ignore[operator]
                else:
                    get_peft_model(model, config, name)
                if random:
                    self.fill(model, name)
        return model.eval()

    def fill(self, model: nn.Module, name: str) -> None:
        """Random values for every trained tensor of an adapter."""
        generator = torch.Generator().manual_seed(_seed(name))
        seen: set[int] = set()
        with torch.no_grad():
            for owner, attribute in record(model, name).learned:
                tensor = getattr(owner, attribute)
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.randomize(attribute, tensor, generator)


@contextlib.contextmanager
def fixed_seed(name: str) -> Iterator[None]:
    """Global randomness that depends on `name` alone, put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(name))
        yield


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def state(model: nn.Module) -> PeftState:
    """The core's record of a model's adapters."""
    found: PeftState = model._peft  # type: ignore[assignment]
    return found


def record(model: nn.Module, name: str) -> AdapterRecord:
    """The core's record of one adapter."""
    return state(model).record(name)


def trained(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The tensors of an adapter that train, by a name that tells where each is."""
    adapter = record(model, name)
    places: dict[int, str] = {}
    for request, root in zip(adapter.requests, adapter.adapters, strict=True):
        for inner, module in root.named_modules():
            where = ":".join(part for part in (request.path, request.part, inner) if part)
            places.setdefault(id(module), where)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for owner, attribute in adapter.learned:
        parameter = getattr(owner, attribute)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[f"{places.get(id(owner), 'shared')}.{attribute}"] = parameter
    return found


def tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Copies of everything an adapter saves, by site and slot."""
    adapter = record(model, name)
    found = {
        f"{request.path}:{request.part}:{slot}": tensor.detach().clone()
        for request, one in zip(adapter.requests, adapter.adapters, strict=True)
        for slot, tensor in one.state().items()
    }
    return found | {f"shared:{slot}": t.detach().clone() for slot, t in adapter.shared.state_dict().items()}


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of the base's weights under their original names."""
    found = model.base_state_dict() if hasattr(model, "base_state_dict") else model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's output, without a graph."""
    with torch.no_grad(), promised("an adapted model runs", "Adapter.forward"):
        return model(*args, **kwargs)

"""What the author of a method tells the suite, and how the suite makes its models."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import methods
from peft_core.config import AdapterConfig
from peft_core.methods import register_method, unregister_method
from peft_core.model import get_peft_model
from peft_core.records import AdapterRecord, PeftState

from .checks import explained, promised
from .models import TinyNet, seeded


class Setup:
    """What a contract class may say about its method; only `config` must be given.

    Attributes:
        config: the config to prove, without dropout; sizes that fit layers of 8, 12, 16 and 24 features.
        layer_kinds: kinds of `peft_core.testing.KINDS` that the method adapts; all others it must refuse.
        refused_cases: cases of `peft_core.testing.CASES` of those kinds that it refuses all the same.
        left_out: modules of the suite's model of those kinds that are not adapted.
        mergeable: False where every merge must be refused.
        unmergeable_cases: cases whose merge is refused although others merge.
        exact_gradients: False where the method detaches something on purpose.
        unused: trained tensors that get no gradient, as failures name them.
        tolerance: largest relative difference between two ways to compute the same.
        neutral_at_start: False where start values are taken from the layer's own weights.
        siblings: modules of other methods that the method's module needs.
        plugin: the module or object of a method that is not installed.

    Methods to override: `configure`, `call_arguments`, `merge_arguments`, `randomize`, `prepare` for a method that
    needs other adapters on the model, and `base` for another model.
    """

    config: ClassVar[AdapterConfig]
    """The config to prove. Sizes that fit layers of 8, 12, 16 and 24 features; no dropout."""

    layer_kinds: ClassVar[Collection[str]] = ("linear",)
    """What the method adapts (see `peft_core.testing.KINDS`): kinds of layers and "block"; all others it must
    refuse. "model" is for a method that chooses its places by itself, the model as a whole among them: it is
    proved on the suite's models, and not on single layers."""

    refused_cases: ClassVar[Collection[str]] = ()
    """Cases (see `peft_core.testing.CASES`) of those kinds that the method refuses all the same."""

    left_out: ClassVar[Collection[str]] = ()
    """Modules of the suite's model (see `peft_core.testing.TinyNet.kinds`) of those kinds that are not adapted,
    because the method refuses them or cannot merge into them."""

    mergeable: ClassVar[bool] = True
    """Whether the method can be folded into the base weights; if not, it must refuse."""

    unmergeable_cases: ClassVar[Collection[str]] = ()
    """Cases whose merge the method refuses although it can merge others."""

    exact_gradients: ClassVar[bool] = True
    """Whether gradients are the derivative of the output; False where the method detaches something on
    purpose."""

    unused: ClassVar[Collection[str]] = ()
    """Trained tensors that get no gradient, by the names that failures give them ("blocks.1.update.weight", or
    "layer.update.weight" at a single layer): for instance what a block computes for the next, in the last block.
    All others must get one."""

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
        """The config for a model whose modules of the method's kinds are `targets`; none where the method chooses
        its places by itself."""
        if not targets or "target_modules" not in type(self.config).model_fields:
            return self.config
        return self.config.resolve(target_modules=targets)

    def call_arguments(self, rows: int) -> dict[str, Any]:
        """Keyword arguments that calls of an adapted model with a batch of `rows` rows are given: the method's
        request arguments, such as `{"task_ids": torch.arange(rows) % 2}`. The same for the same `rows`."""
        return {}

    def merge_arguments(self) -> dict[str, Any]:
        """The request arguments that a merge is given, such as `{"task_ids": 1}`. Calls that a merge is compared
        with get this value in every row."""
        return {}

    def randomize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Move a trained tensor away from its start, in place, as training would."""
        tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3)

    def prepare(self, model: nn.Module, targets: list[str]) -> None:
        """Put onto a fresh model what the method's config refers to: other adapters, at modules among `targets` or
        where you like, the same at each call. `self.put(model, name, config)` does it for one."""

    # -- for the tests ---------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(f"{__package__}."):  # not the author's own tests
            for name, member in list(vars(cls).items()):
                if name.startswith("test_"):
                    setattr(cls, name, explained(member))

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
        before = dict(methods._registered)  # by the author's module itself, perhaps
        with promised("the method can be registered", "peft_config and the other hooks of `plugin`"):
            method = register_method(self.plugin, replace=True)
        try:
            yield
        finally:
            unregister_method(method.name)
            if method.name in before:
                methods._registered[method.name] = before[method.name]

    def base(self, dtype: torch.dtype = torch.float64) -> TinyNet:
        """A fresh base model, always with the same weights."""
        model: TinyNet = seeded(TinyNet, dtype)
        return model

    def fresh(self, dtype: torch.dtype = torch.float64) -> Any:
        """A base model with what `prepare` puts onto it, and nothing active."""
        model = self.base(dtype)
        self.prepare(model, self.targets())
        return model.eval()

    def targets(self) -> list[str]:
        """Names of the modules of the suite's model that are adapted."""
        return [name for name in TinyNet.targets(self.layer_kinds) if name not in self.left_out]

    def adapted(
        self,
        *names: str,
        base: nn.Module | None = None,
        random: bool = True,
        config: AdapterConfig | None = None,
        look: str = "peft_build, peft_prepare and what else adapts a model; or `layer_kinds`, `left_out`",
    ) -> Any:
        """A model with these adapters (default: one, "a"), the first active, in eval mode.

        The same name always gets the same values, whatever else is on the model. `look` is for the message where the
        method does not adapt the model.
        """
        __tracebackhide__ = True
        model = self.fresh() if base is None else base
        config = config or self.configure(self.targets())
        places = getattr(config, "target_modules", None) or "its own places"
        for index, name in enumerate(names or ("a",)):
            with promised(f"the method adapts {type(model).__name__} at {places}", look):
                self.put(model, name, config, active=not index, random=random)
        return model.eval()

    def put(
        self, model: nn.Module, name: str, config: AdapterConfig, *, active: bool = False, random: bool = True
    ) -> None:
        """Add an adapter, with values that depend on its name alone; `random` ones, or those of its start."""
        __tracebackhide__ = True
        with fixed_seed(name):
            if active:
                get_peft_model(model, config, name)
            elif hasattr(model, "_peft"):
                model.add_adapter(name, config)  # type: ignore[operator]
            else:
                get_peft_model(model, config, name).set_adapter([])
            if random:
                self.fill(model, name)

    def call(self, model: Any, *args: Any, rows: int | None = None, merging: bool = False, **kwargs: Any) -> Any:
        """The model's output. An adapted model is given the method's `call_arguments`.

        `rows` is the size of the batch, by default that of the first argument. `merging`: every row gets the values
        of `merge_arguments`.
        """
        __tracebackhide__ = True
        with promised("", "Adapter.forward"):
            return model(*args, **self.arguments(model, args, rows, merging), **kwargs)

    def arguments(self, model: Any, args: tuple[Any, ...], rows: int | None, merging: bool = False) -> dict[str, Any]:
        """`call_arguments` for a call with these positional arguments; nothing for a model without adapters."""
        if not (hasattr(model, "_peft") and state(model).adapters):
            return {}
        given = self.call_arguments(args[0].shape[0] if rows is None else rows)
        if merging:
            for name, value in self.merge_arguments().items():
                old = given.get(name)
                given[name] = torch.full_like(old, value) if isinstance(old, Tensor) else value
        return given

    def merge(self, model: Any, promise: str, look: str) -> None:
        """Merge the active adapters, with `merge_arguments`; a merge that is an approximation must warn."""
        __tracebackhide__ = True
        with promised(promise, look):
            if self.merges_exactly(model):
                model.merge_adapter(**self.merge_arguments())
            else:
                with pytest.warns(UserWarning, match="is an approximation"):
                    model.merge_adapter(**self.merge_arguments())

    def merges_exactly(self, model: Any) -> bool:
        """Whether no active adapter says of itself that its merge is an approximation."""
        return not any(one.merge_is_approximate for name in state(model).active for one in record(model, name).adapters)

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As `call`, without a graph."""
        __tracebackhide__ = True
        with torch.no_grad():
            return self.call(model, *args, **kwargs)

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
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that is allocated without values holds NaN, so that nothing can be lucky."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills


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
    for inner, module in adapter.shared.named_modules():
        places[id(module)] = f"shared.{inner}" if inner else "shared"
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for owner, attribute in adapter.learned:
        parameter = getattr(owner, attribute)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[f"{places[id(owner)]}.{attribute}"] = parameter
    return found


def copy_tensors(source: nn.Module, target: nn.Module) -> None:
    """Give adapter "a" of `target` all values of that of `source`, in its own dtypes, trained or not."""
    one, other = record(source, "a"), record(target, "a")
    pairs = (*zip(one.adapters, other.adapters, strict=True), (one.shared, other.shared))
    with torch.no_grad():
        for here, there in pairs:
            values = {**dict(here.named_parameters()), **dict(here.named_buffers())}
            for name, tensor in (*there.named_parameters(), *there.named_buffers()):
                tensor.copy_(values[name])


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

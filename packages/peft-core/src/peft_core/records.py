"""What a model knows about its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .config import AdapterConfig
from .errors import AdapterNotFoundError
from .layers import SiteRequest
from .methods import Method
from .routing import Request, Routing
from .site import Site
from .suggest import did_you_mean


@dataclass(frozen=True)
class AdapterState:
    """A config and values for an adapter that is still to be made: what calibration and combination return.

    `tensors` are by site, then by slot, a site being its path, or `path:part` where a module has several; slots that
    are not given get their starting values. `shared` are by slot of the shared module. `report` is what the user is
    told: how far an approximation is off, by site, say.
    """

    config: AdapterConfig
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """A change of the model's own build, which an adapter brings with it and which goes with it.

    `modules` take the place of others, by path, and may share parameters with them; `config` are attributes of
    `model.config` that go with it (the number of layers, say).
    """

    modules: Mapping[str, nn.Module]
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class AdapterRecord:
    """One adapter of a model: its method, its resolved config, and its part at every site.

    `trainable` is the adapter's own standing; its tensors require gradients while it is trainable and active.
    """

    name: str
    method: Method
    config: AdapterConfig
    requests: list[SiteRequest]
    adapters: list[Adapter]
    shared: nn.Module
    trainable: bool = True
    learned: list[tuple[nn.Module, str]] = field(default_factory=list)
    with_losses: list[Adapter] = field(default_factory=list)
    """Those of `adapters` that have terms of the loss."""
    structure: Structure | None = None
    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """Parent, attribute and module of what stood where the structure's modules are."""
    config_before: dict[str, Any] = field(default_factory=dict)

    def note_learned(self) -> None:
        """Note which tensors train, those that require gradients as they were built, and who adds to the loss."""
        self.with_losses = [adapter for adapter in self.adapters if type(adapter).losses is not Adapter.losses]
        self.learned = [
            (module, key)
            for owner in (*self.adapters, self.shared)
            for module in owner.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]

    @property
    def placed(self) -> dict[str, Adapter]:
        """Its adapters by `SiteRequest.key`."""
        return {request.key: adapter for request, adapter in zip(self.requests, self.adapters, strict=True)}

    @property
    def describes_calls(self) -> bool:
        """Whether an adapter of this record reads the facts of each call."""
        return bool(self.config.request_arguments) or any(adapter.uses_call for adapter in self.adapters)

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that train when the adapter does."""
        return [parameter for owner, name in self.learned if (parameter := owner._parameters[name]) is not None]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the adapter, trained or not, each once."""
        found: dict[int, Tensor] = {}
        for module in (*self.adapters, self.shared):
            for tensor in (*module.parameters(), *module.buffers()):
                found[id(tensor)] = tensor
        return list(found.values())

    def require_grad(self, flag: bool) -> None:
        """Turn gradients of the learned tensors on or off."""
        for parameter in self.parameters():
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


@dataclass
class PeftState:
    """Everything the library keeps on a model, as one plain attribute."""

    routing: Routing = field(default_factory=Routing)
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    thawed: frozenset[str] = frozenset()
    """Names of the base parameters that required gradients before the first adapter came."""
    snapshots: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Original parameters and buffers of the sites whose adapters are merged, by path."""
    resting: tuple[str, ...] = ()
    """What was active before the merge."""
    unnested: list[nn.Module] = field(default_factory=list)
    """Encoders that are kept from nested tensors while they hold adapters."""

    active: tuple[str, ...] = ()
    enabled: bool = True

    def publish(self) -> None:
        """Make the standing choice what `active` and `enabled` say. One assignment: calls see old or new."""
        self.routing.default = Request(self.active if self.enabled else ())

    def note_adapters(self) -> None:
        """Tell the routing what the present adapters ask of every call."""
        records = self.adapters.values()
        self.routing.known = frozenset(self.adapters)
        self.routing.arguments = tuple(dict.fromkeys(n for r in records for n in r.config.request_arguments))
        self.routing.describes_calls = any(r.describes_calls for r in records)

    def users_of(self, name: str) -> list[str]:
        """Names of the adapters that are made of this one."""
        return [record.name for record in self.adapters.values() if name in record.config.refers_to()]

    def made_of(self, name: str) -> set[str]:
        """Names of all adapters that this one, present or not, works with: itself, and what it is made of."""
        found: set[str] = set()
        left = [name]
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self.adapters[name].config.refers_to() if name in self.adapters else ()
        return found

    def record(self, name: str) -> AdapterRecord:
        """The adapter of that name. Raises `AdapterNotFoundError`."""
        try:
            return self.adapters[name]
        except (KeyError, TypeError):
            known = list(self.adapters)
            hint = did_you_mean(name, known) if isinstance(name, str) else ""
            raise AdapterNotFoundError(
                f"no adapter {name!r} on this model; it has {known or 'none'}.{hint} "
                "Add one with add_adapter(name, config) or load_adapter(path, name)."
            ) from None


def state_of(model: nn.Module) -> PeftState | None:
    """What the model knows about its adapters, or None for a model that never had any."""
    state: PeftState | None = model.__dict__.get("_peft")
    return state

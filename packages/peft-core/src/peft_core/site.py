"""What sits at an adapted module's place: the module, and adapters by name.

This is the hot path. It runs no hook, copies nothing, and costs one dictionary look-up when no adapter is active.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .errors import PeftError, RequestError, add_note
from .layers import BaseLayer
from .link import Link
from .memo import Memo
from .recorders import recorders
from .routing import Request, Routing

_WHERE = "Raised in the adapted layer"
_OWN = frozenset({"base_layer", "_hf_hook", "_old_forward"})
"""Attributes that are never the base layer's. By the last two, accelerate marks the very module that it hooked."""


class Site(nn.Module):
    """A module with middleware. Attributes it does not have are the base layer's."""

    def __init__(self, layer: BaseLayer, routing: Routing) -> None:
        super().__init__()
        self._hold(layer.module)
        self.adapters = nn.Module()
        self._routing = routing
        self._layer = layer
        self._chains: dict[str, tuple[Adapter, ...]] = {}
        self._memo = Memo()
        self._last_split: _Split | None = None
        self._input = _first_input(type(layer.module).forward)
        self.training = layer.module.training

    def _hold(self, module: nn.Module) -> None:
        self.base_layer = module

    def run_base(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base module alone."""
        return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]  # read past two `__getattr__`

    # -- adapters by name ----------------------------------------------------------------------------------------

    def attach(self, name: str, part: str, adapter: Adapter) -> None:
        """Add one adapter; its order among the adapters of that name is the order of attaching."""
        # Written past add_module, which refuses names that are attributes of nn.Module ("train", "half" ...).
        self.adapters._modules[f"{name}:{part}" if part else name] = adapter
        self._chains[name] = (*self._chains.get(name, ()), adapter)
        adapter.train(self.training)

    def detach(self, name: str) -> None:
        """Remove every adapter of that name."""
        self._last_split = None
        self._memo.clear()
        self._chains.pop(name, None)
        for key in [k for k in self.adapters._modules if k.partition(":")[0] == name]:
            del self.adapters._modules[key]

    def of(self, name: str) -> dict[str, Adapter]:
        """The adapters of one name, by part."""
        return {k.partition(":")[2]: a for k, a in self.adapters._modules.items() if k.partition(":")[0] == name}  # type: ignore[misc]

    def train(self, mode: bool = True) -> Site:
        self._memo.clear()
        return super().train(mode)

    def names(self) -> tuple[str, ...]:
        """Names of the adapters at this site."""
        return tuple(self._chains)

    def chain(self, active: tuple[str, ...]) -> tuple[Adapter, ...]:
        """The adapters that act when `active` is active, innermost first."""
        if len(active) == 1:
            return self._chains.get(active[0], ())
        return tuple(adapter for name in active for adapter in self._chains.get(name, ()))

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not args and self._input in kwargs:  # adapters find the input in one place
            kwargs = dict(kwargs)
            args = (kwargs.pop(self._input),)
        module, routing = self._layer.module, self._routing
        recording = recorders(module) if module._forward_hooks else ()
        request = routing.current()
        try:
            if routing.merged:
                _check_merged(routing, request)
                out = self.run_base(*args, **kwargs)
            elif request.rows is not None:
                out = self._forward_rows(request, args, kwargs)
            else:
                out = self._run(self.chain(request.active), request, args, kwargs)
        except Exception as error:
            self._say_where(error, request)
            raise
        for record in recording:
            record(module, args, out)
        return out

    def _run(self, chain: tuple[Adapter, ...], request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not chain:
            return self.run_base(*args, **kwargs)
        if len(args) == 1 and not kwargs and all(adapter.additive for adapter in chain):
            return self._run_additive(chain, args[0])
        return Link(self, chain, request)(*args, **kwargs)

    def _say_where(self, error: Exception, request: Request) -> None:
        """Note the site and its adapters on an error that came through, once: at the innermost one."""
        chain = [f"{name!r} ({type(a).__name__})" for name in request.names() for a in self.chain((name,))]
        if chain and not isinstance(error, PeftError) and _WHERE not in "".join(getattr(error, "__notes__", ())):
            add_note(error, f"{_WHERE} {self._layer.path or 'the model itself'}, which has {', '.join(chain)}.")

    def _run_additive(self, chain: tuple[Adapter, ...], x: Tensor) -> Tensor:
        """Flat path: the base once, then every delta onto its output; a linear layer's deltas see flat rows."""
        shape = x.shape
        flat = self._layer.kind == "linear" and len(shape) > 2
        rows = x.flatten(0, -2) if flat else x
        if flat and not self._layer.positionwise:  # what else the module does may depend on the shape
            out: Tensor = self.run_base(x).flatten(0, -2)
        else:
            out = self.run_base(rows)
        for adapter in chain:
            out = adapter.accumulate(out, rows)  # type: ignore[operator]
        return out.view(*shape[:-1], out.shape[-1]) if flat else out

    # -- one adapter per row -------------------------------------------------------------------------------------

    def _forward_rows(self, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dim = self._layer.batch_dim
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is None or first.dim() <= dim:
            raise RequestError(
                f"{self._layer.path}: adapter_names needs tensor inputs whose dimension {dim} is the batch"
            )
        size = first.shape[dim]
        split = self._split(request, size, first.device)
        groups = split.groups
        if not any(chain for chain, _ in groups):
            return self.run_base(*args, **kwargs)
        if len(groups) == 1:
            return self._run(groups[0][0], request, args, kwargs)
        if split.index is not None:
            adapters = split.adapters
            at_once = adapters[0].forward_rows(adapters, split.index, Link(self, (), request), *args, **kwargs)
            if at_once is not NotImplemented:
                return at_once
        if len(args) == 1 and not kwargs and all(a.additive for chain, _ in groups for a in chain):
            out: Tensor = self.run_base(first)
            for chain, rows in groups:
                if chain:
                    part, x = out.index_select(dim, rows), first.index_select(dim, rows)
                    for adapter in chain:
                        part = adapter.added(part, x)  # type: ignore[operator]
                    out = out.index_copy(dim, rows, part)
            return out
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            raise RequestError(
                f"{self._layer.path or 'the model itself'}: one adapter per row runs this part of the model on some "
                "rows at a time, and they cannot share the cache of all; generate with use_cache=False, or once per "
                "adapter (a method whose class has forward_rows needs neither)"
            )
        pieces, nests = [], self._nests()
        for (active, _), (chain, rows) in zip(request.groups(size, first.device), groups, strict=True):
            own = request if request.call is None else replace(request, call=request.call.of_rows(rows, size))
            own = replace(own, active=active, rows=None) if nests else own  # sites inside see these rows alone
            with self._routing.within(own) if nests else nullcontext():
                pieces.append(self._run(chain, own, *self._layer.take_rows(args, kwargs, size, rows)))
        order = torch.cat([rows for _, rows in groups]).argsort()
        return self._layer.join_rows(pieces, [len(rows) for _, rows in groups], order)

    def check_rowwise(self, chain: tuple[Adapter, ...]) -> None:
        """Raise `RequestError` where one of these adapters cannot act on a part of a batch."""
        for adapter in chain:
            if not adapter.rowwise:
                raise RequestError(
                    f"{self._layer.path}: {type(adapter).__name__} mixes the rows of a batch, so it cannot be "
                    "chosen per row with adapter_names; call the model once per adapter"
                )

    def _nests(self) -> bool:
        """Whether other sites are inside this one."""
        inside = self.base_layer.modules() if self._layer.kind in ("module", "attention") else ()
        return any(isinstance(module, Site) for module in inside)

    def _split(self, request: Request, size: int, device: torch.device) -> _Split:
        """How the rows' names divide a batch here. The last answer is kept: the tokens of a generation ask the same."""
        if torch.compiler.is_compiling():
            return self._made_split(request, size, device)
        key = request.rows, size, device, torch.is_inference_mode_enabled()
        split, chains = self._last_split, self._chains
        # Adapters may have come and gone, or a change of theirs may have been taken back.
        if split is None or split.key != key or split.chains != [chains.get(name) for name in split.names]:
            split = self._last_split = replace(self._made_split(request, size, device), key=key)
        return split

    def _made_split(self, request: Request, size: int, device: torch.device) -> _Split:
        names = request.names()
        chains = [self._chains.get(name) for name in names]
        groups = [(self.chain(active), rows) for active, rows in request.groups(size, device)]
        for chain, _ in groups:
            self.check_rowwise(chain)
        adapters = [chain[0] for chain, _ in groups if chain]
        forms = {_batched_form(adapter) for adapter in adapters}
        index = None
        # The method's own batched form, where all the rows' adapters have one, and the same.
        if len(forms) == 1 and _batched_form(Adapter) not in forms and all(len(chain) < 2 for chain, _ in groups):
            index = request.index(size, device, tuple(bool(chain) for chain, _ in groups))
        return _Split(names, chains, groups, adapters, index)

    # -- looking like the base layer -----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `base_layer`: not there yet, or half unpickled. Protocols such as copying are the site's own.
            if name in _OWN or (name.startswith("__") and name.endswith("__")):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is None or name in self.__dict__ or name in self._modules or name in _OWN or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif hasattr(base, name):
            setattr(base, name, value)  # e.g. a model that ties its weights again
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.base_layer)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return f"adapters={list(self._chains)}"


@dataclass(frozen=True, eq=False)
class _Split:
    """The groups of a batch's rows, and the form that computes them at once: its adapters and each row's number."""

    names: tuple[str, ...]
    chains: list[tuple[Adapter, ...] | None]
    groups: list[tuple[tuple[Adapter, ...], Tensor]]
    adapters: list[Adapter]
    index: Tensor | None
    key: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    return None


def _batched_form(adapter: Any) -> Any:
    return adapter.forward_rows.__func__


@functools.cache
def _first_input(forward: Callable[..., Any]) -> str:
    """The name of the first argument of a class's forward, where it may be given by position."""
    first = next(iter(list(inspect.signature(forward).parameters.values())[1:]), None)
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else ""


def _check_merged(routing: Routing, request: Request) -> None:
    if routing.merged_for and request.call is not None:
        given = request.call.arguments
        other = [n for n, v in routing.merged_for.items() if given.get(n) is not None and not _all_equal(given[n], v)]
        if other:
            raise RequestError(
                f"adapters {list(routing.merged)} are merged for {routing.merged_for}, but this call has another "
                f"{other[0]}; leave it out, or call unmerge_adapter() first"
            )
    if request.rows is not None or request.active != routing.merged:
        raise RequestError(
            f"adapters {list(routing.merged)} are merged into the base weights, but this call wants "
            f"{list(request.rows or request.active) or 'no adapter'}; call unmerge_adapter() first"
        )


def _all_equal(value: Any, wanted: Any) -> bool:
    try:
        one, other = torch.as_tensor(value), torch.as_tensor(wanted)
    except (TypeError, ValueError, RuntimeError):  # no numbers
        return bool(value == wanted)
    fits = other.numel() == 1 or one.shape == other.shape
    return fits and bool((one == other.to(one.device)).all())

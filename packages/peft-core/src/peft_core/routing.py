"""Who is active, for which rows, in which call.

One `Routing` per model, a plain attribute every site holds. Plain on purpose: activation checkpointing recomputes
blocks after the forward has returned and perhaps on another thread, where thread-locals are lost; and context
variables break compiled graphs. Each call works on an immutable `Request`, taken when the call starts, so a switch
or another thread's call cannot change it half way.

A compiled graph cannot ask which thread it runs on. It sees the distinct requests of all calls in flight instead
(`_in_flight`), which the compiler guards on: one that all calls agree on is right for each of them, and where they
differ the graph is refused. Calls that are themselves part of a graph are not in flight; see `traced`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .calls import Call
from .errors import AdapterNotFoundError, RequestError

BASE = "__base__"
"""Name that stands for "no adapter" among the names of a batch's rows."""

_NOTING = threading.Lock()
_BACKWARDS = 8
"""How many backwards, on as many threads, may be under way before the oldest is forgotten."""


@dataclass(frozen=True)
class Request:
    """What one call uses: the active adapters, innermost first, and perhaps one adapter per row.

    `call` holds the call's facts where an adapter of the model wants them; such requests equal none but themselves.
    """

    active: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    call: Call | None = None

    def names(self) -> tuple[str, ...]:
        """Every adapter that acts in the call."""
        if self.rows is None:
            return self.active
        return tuple(name for name in dict.fromkeys(self.rows) if name != BASE)

    def groups(self, size: int, device: torch.device) -> list[tuple[tuple[str, ...], Tensor]]:
        """Adapters and row indices for a batch of `size` rows (several per name under beam search).

        Raises `RequestError` where `size` is no multiple of the number of names.
        """
        assert self.rows is not None
        if torch.compiler.is_compiling():
            return _grouped(self.rows, size, device)
        return _groups(self.rows, size, device, torch.is_inference_mode_enabled())

    def index(self, size: int, device: torch.device, here: tuple[bool, ...]) -> Tensor:
        """(rows,): which of the groups each row is in, counted without those that are not `here`: theirs is -1."""
        assert self.rows is not None
        if torch.compiler.is_compiling():
            return _indexed(self.rows, size, device, here)
        return _index(self.rows, size, device, here, torch.is_inference_mode_enabled())


def _grouped(rows: tuple[str, ...], size: int, device: torch.device) -> list[tuple[tuple[str, ...], Tensor]]:
    repeat, rest = divmod(size, len(rows))
    if rest or not repeat:
        raise RequestError(
            f"adapter_names has {len(rows)} entries, but a layer received a batch of {size} rows; give one "
            "name per row of the batch. A layer whose input is shared by all rows cannot use one adapter per row."
        )
    found: dict[str, list[int]] = {}
    for index, name in enumerate(rows):
        found.setdefault(name, []).extend(range(index * repeat, (index + 1) * repeat))
    return [
        ((() if name == BASE else (name,)), torch.tensor(indices, device=device)) for name, indices in found.items()
    ]


def _indexed(rows: tuple[str, ...], size: int, device: torch.device, here: tuple[bool, ...]) -> Tensor:
    numbers, count = {}, 0
    for name, present in zip(dict.fromkeys(rows), here, strict=True):
        numbers[name] = count if present else -1
        count += present
    repeat = size // len(rows)
    return torch.tensor([numbers[name] for name in rows for _ in range(repeat)], device=device)


# Layers of one shape, and the tokens of a generation, ask the same again and again. Tensors of the inference mode are
# of no use outside it, so that it is part of what is asked.
@functools.lru_cache(maxsize=256)
def _groups(
    rows: tuple[str, ...], size: int, device: torch.device, inference: bool
) -> list[tuple[tuple[str, ...], Tensor]]:
    return _grouped(rows, size, device)


@functools.lru_cache(maxsize=256)
def _index(rows: tuple[str, ...], size: int, device: torch.device, here: tuple[bool, ...], inference: bool) -> Tensor:
    return _indexed(rows, size, device, here)


class Routing:
    """The model's standing choice of adapters, and the requests in flight."""

    def __init__(self) -> None:
        self.default = Request()
        self.merged: tuple[str, ...] = ()
        self.merged_for: dict[str, Any] = {}
        """Request arguments that the merged weights are for."""
        self.arguments: tuple[str, ...] = ()
        """Names of the request arguments that adapters of the model declare."""
        self.known: frozenset[str] = frozenset()
        """Names of the adapters of the model."""
        self.describes_calls = False
        """Whether an adapter of the model wants the facts of each call."""
        self.loss_terms: dict[str, Tensor] = {}
        """What adapters added to the loss of the last call."""
        self.defers_losses = False
        """Whether the caller adds the loss terms by itself."""
        self._backwards: dict[int, tuple[weakref.ref[Request], ...]] = {}
        self._requests: dict[int, Request] = {}
        self._in_flight: tuple[Request, ...] = ()
        self._traced: Request | None = None
        self._recent: tuple[Request, ...] = ()
        self._recomputed = False

    def current(self) -> Request:
        """The request of the calling thread's running call, or the standing choice."""
        if torch.compiler.is_compiling():
            return self._current_of_graph()
        if self._requests:
            request = self._requests.get(threading.get_ident())
            if request is not None:
                return request
        if self._traced is not None:
            raise RequestError(
                "the compiled model's graph broke, and the part that runs outside of it cannot know the call's "
                "adapter_names; compile with fullgraph=True to see where, or call the model uncompiled"
            )
        if (self._recent or self._backwards) and _in_backward():
            return self._recomputing()
        return self.default

    def _recomputing(self) -> Request:
        """The request of a block that is recomputed by a checkpoint function which did not remember it.

        Raises `RequestError` where calls with different requests came before this backward.
        """
        self._recomputed = True
        noted = self._backwards.get(torch._C._current_graph_task_id(), ())
        known = [request for ref in noted if (request := ref()) is not None] or self._recent
        if len(known) != 1:
            which = "calls with different adapters came" if known else "no known output of the model came"
            raise RequestError(
                f"{which} before one backward, and the model's own activation checkpointing "
                "recomputes a block without saying whose it is; call backward after each call, or wrap the "
                "checkpoint function with peft_core.routing.remembering"
            )
        return known[0]

    def follow(self, outputs: Any, request: Request) -> None:
        """Note, when a backward comes through these outputs, whose call it is: recomputed blocks will ask."""

        def note(gradient: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            # Weakly: a request may hold activations, and this hook keeps it for as long as the graph lives.
            noted = dict.fromkeys((*self._backwards.get(task, ()), weakref.ref(request)))
            self._backwards = {**dict(list(self._backwards.items())[-_BACKWARDS:]), task: tuple(noted)}

        if not isinstance(outputs, (Tensor, tuple, list, Mapping)):
            outputs = getattr(outputs, "__dict__", {})
        for value in _tensors(outputs):
            if value.requires_grad and value.grad_fn is not None:
                value.register_hook(note)  # type: ignore[no-untyped-call]

    def _current_of_graph(self) -> Request:
        if self._traced is not None:
            return self._traced
        if not self._in_flight:
            return self.default
        if len(self._in_flight) > 1:
            raise RequestError(
                "calls with different adapters are in flight on several threads, and compiled layers cannot tell "
                "them apart; make such calls one after the other, or uncompiled"
            )
        return self._in_flight[0]

    def traced(self, request: Request, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call that is itself being compiled, from its start to its end, with `request`.

        Raises `RequestError` where another call is in flight with other adapters.
        """
        if request.rows is None and request.call is None:
            if self._in_flight and self._in_flight != (request,):
                raise RequestError(
                    "a compiled call of the model cannot run within, or beside, a call with other adapters; make them "
                    "one after the other, or give adapter_names to the compiled call itself"
                )
            return call(*args, **kwargs)
        self._traced = request
        try:
            result = call(*args, **kwargs)
            if self._traced is not request:  # the graph broke, and another thread came in between
                raise RequestError("compiled calls with adapter_names ran at once; make them one after the other")
            return result
        finally:
            self._traced = None

    @contextmanager
    def use(self, request: Request) -> Iterator[None]:
        """Run with `request` on this thread; whatever happens inside, the previous one comes back."""
        ident = threading.get_ident()
        outer = self._requests.get(ident)
        self._note(ident, request)
        try:
            yield
        finally:
            self._note(ident, outer)
            if request.call is None and torch.is_grad_enabled() and not _in_backward():
                recent = () if self._recomputed else self._recent
                self._recent = tuple(dict.fromkeys((*recent, request)))[-2:]  # two are as many as can be told apart
                self._recomputed = False

    @contextmanager
    def within(self, request: Request) -> Iterator[None]:
        """Run a part of a call with another request, be the call compiled or not."""
        if not torch.compiler.is_compiling():
            with self.use(request):
                yield
            return
        outer, self._traced = self._traced, request
        try:
            yield
        finally:
            self._traced = outer

    def _note(self, ident: int, request: Request | None) -> None:
        with _NOTING:
            if request is None:
                del self._requests[ident]
            else:
                self._requests[ident] = request
            self._in_flight = tuple(dict.fromkeys(self._requests.values()))

    def request(self, rows: Sequence[str] | None, call: Call | None = None) -> Request:
        """The request of a call that starts now. A call within a call (generate, forward) continues the outer one."""
        if rows is not None:
            return Request(self.default.active, tuple(rows), call)
        found = self.outer() or self.default
        return found if call is None else replace(found, call=call)

    def check_name(self, name: str) -> None:
        """Raise `AdapterNotFoundError` where no adapter of the model has that name."""
        if name not in self.known:
            raise AdapterNotFoundError(f"no adapter {name!r} on this model; it has {sorted(self.known) or 'none'}")

    def outer(self) -> Request | None:
        """The request of the call that runs on this thread, if any."""
        return self._requests.get(threading.get_ident()) if self._requests else None

    def standing(self) -> dict[str, Any]:
        """What stands between calls, by attribute; the rest is about calls that run, or ran."""
        names = ("known", "default", "merged", "merged_for", "arguments", "describes_calls")
        return {name: self.__dict__[name] for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return {**Routing().__dict__, **self.standing()}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, those in tuples, lists and mappings included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def remembering(routing: Routing, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an activation-checkpoint function so that the recompute runs under the forward's request."""
    return _Remembering(routing, checkpoint)


def remembers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that `remembering` wrapped, or the function itself."""
    return function.checkpoint if isinstance(function, _Remembering) else function


class _Remembering:
    """A checkpoint function that carries the request into the recompute."""

    def __init__(self, routing: Routing, checkpoint: Callable[..., Any]) -> None:
        self.routing = routing
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        routing, request = self.routing, self.routing.current()

        def remembered(*inner: Any, **named: Any) -> Any:
            with routing.use(request):
                return function(*inner, **named)

        return self.checkpoint(remembered, *args, **kwargs)

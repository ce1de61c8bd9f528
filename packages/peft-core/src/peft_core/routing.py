"""Who is active, for which rows, in which call.

One `Routing` per model, a plain attribute every site holds. Plain on purpose: activation checkpointing recomputes
blocks after the forward has returned and perhaps on another thread, where thread-locals are lost; and context
variables break compiled graphs. Each call works on an immutable `Request`, taken when the call starts, so a switch
or another thread's call cannot change it half way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError

BASE = "__base__"
"""Name that stands for "no adapter" among the names of a batch's rows."""


@dataclass(frozen=True)
class Request:
    """What one call uses: the active adapters, innermost first, and perhaps one adapter per row."""

    active: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None

    def groups(self, size: int, device: torch.device) -> list[tuple[tuple[str, ...], Tensor]]:
        """Adapters and row indices for a batch of `size` rows (several per name under beam search).

        Raises `RequestError` where `size` is no multiple of the number of names.
        """
        assert self.rows is not None
        repeat, rest = divmod(size, len(self.rows))
        if rest or not repeat:
            raise RequestError(
                f"adapter_names has {len(self.rows)} entries, but a layer received a batch of {size} rows; give one name "
                "per row of the batch. A layer whose input is shared by all rows cannot use one adapter per row."
            )
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.rows):
            found.setdefault(name, []).extend(range(index * repeat, (index + 1) * repeat))
        return [
            ((() if name == BASE else (name,)), torch.tensor(indices, device=device)) for name, indices in found.items()
        ]


class Routing:
    """The model's standing choice of adapters, and the requests in flight."""

    def __init__(self) -> None:
        self.default = Request()
        self.merged: tuple[str, ...] = ()
        self._requests: dict[int, Request] = {}
        self._last: Request | None = None

    def current(self) -> Request:
        """The request of the calling thread's running call, or the standing choice."""
        if torch.compiler.is_compiling():
            return self.default
        if self._requests:
            request = self._requests.get(threading.get_ident())
            if request is not None:
                return request
        # A block recomputed in backward by a checkpoint the model did not hand us: the last call is the best answer.
        if self._last is not None and torch._C._current_graph_task_id() != -1:
            return self._last
        return self.default

    @contextmanager
    def use(self, request: Request) -> Iterator[None]:
        """Run with `request` on this thread; whatever happens inside, the previous one comes back."""
        ident = threading.get_ident()
        outer = self._requests.get(ident)
        self._requests[ident] = request
        try:
            yield
        finally:
            if outer is None:
                del self._requests[ident]
            else:
                self._requests[ident] = outer
            if torch.is_grad_enabled():
                self._last = request

    def request(self, rows: Sequence[str] | None) -> Request:
        """The request of a call that starts now. A call within a call (generate, forward) continues the outer one."""
        if rows is not None:
            return Request(self.default.active, tuple(rows))
        if self._requests:
            outer = self._requests.get(threading.get_ident())
            if outer is not None:
                return outer
        return self.default

    @contextmanager
    def standing(self, request: Request) -> Iterator[None]:
        """Change the standing choice for a while."""
        before = self.default
        self.default = request
        try:
            yield
        finally:
            self.default = before

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "merged": self.merged, "_requests": {}, "_last": None}


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

"""What an adapter calls: the layer with the adapters further in, the model's running call, and other adapters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .adapter import Adapter
from .calls import Call
from .errors import RequestError
from .layers import Params
from .routing import Request

if TYPE_CHECKING:
    from .site import Site

T = TypeVar("T")

_NO_REQUEST = Request()


class Link:
    """The next callable, as an adapter's `forward` sees it: call it, or read the weights it stands for.

    It also knows the running call of the model, and the way to other adapters.
    """

    __slots__ = ("_known", "_site", "inner", "layer", "request")

    def __init__(
        self,
        site: Site,
        inner: tuple[Adapter, ...] = (),
        request: Request = _NO_REQUEST,
        known: Known | None = None,
    ) -> None:
        self._site = site
        self.layer = site._layer
        self.inner = inner
        self.request = request
        self._known = known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._known is not None and self._known.is_of(self.inner, args, kwargs):
            return self._known.out
        if not self.inner:
            return self._site.run_base(*args, **kwargs)
        return self.inner[-1](Link(self._site, self.inner[:-1], self.request, self._known), *args, **kwargs)

    @property
    def call(self) -> Call:
        """The facts of the model's running call: request arguments, phase, cached length, notes.

        Raises `RequestError` where nobody asked for them, or where a layer is called past the model.
        """
        if self.request.call is None:
            raise RequestError(
                f"{self.layer.path or 'the model'}: the facts of the call are not known here; set `uses_call = True` "
                "on the adapter's class (or declare `request_arguments` on the config's), and call the model itself, "
                "not a part of it"
            )
        return self.request.call

    def remembered(self, kind: str, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` gives, kept at this site while `key` and the tensors stay as they are; see `Memo.of`.

        For what is made of adapters' tensors alone: stacks for the rows of a batch, rotations. One value is kept of
        each `kind`; `key` says whatever else it depends on.
        """
        return self._site._memo.of(kind, key, tensors, make)

    @contextmanager
    def adapters(self, *names: str) -> Iterator[None]:
        """What runs inside uses these adapters at every site (none: the clean base), with notes of its own.

        Raises `AdapterNotFoundError` for a name that no adapter of the model has.
        """
        for name in names:
            self._site._routing.check_name(name)
        call = self.request.call
        with self._site._routing.within(Request(names, call=call and call.apart())):
            yield

    def through(self, name: str, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """What this callable and then the adapter `name` of the model give for these arguments.

        `out` is what the callable alone gives for them, where that is known: it is not run again for an adapter that
        calls it with the same objects (a second run would fill a cache of keys and values twice, or draw another
        dropout). Where the adapter is not at this site, that is the result.

        Raises `AdapterNotFoundError`, and `RequestError` where the adapter cannot be chosen for some rows of a batch.
        """
        chain = self._chain_of(name)
        if out is not None and len(args) == 1 and not kwargs and all(adapter.additive for adapter in chain):
            for adapter in chain:
                out = adapter.added(out, args[0])  # type: ignore[operator]
            return out
        known = None if out is None else Known(self.inner, args, kwargs, out)
        return Link(self._site, self.inner + chain, self.request, known)(*args, **kwargs)

    def delta(self, name: str, *args: Any, out: Tensor, **kwargs: Any) -> Tensor | None:
        """What the adapter `name` adds to `out`, which this callable gives for these arguments; None if nothing here.

        Raises `AdapterNotFoundError`.
        """
        chain = self._chain_of(name)
        if not chain:
            return None
        if len(args) == 1 and not kwargs and all(adapter.additive for adapter in chain):
            found = torch.zeros_like(out)
            for adapter in chain:
                found = adapter.added(found, args[0])  # type: ignore[operator]
            return found
        known = Known(self.inner, args, kwargs, out)
        whole: Tensor = Link(self._site, self.inner + chain, self.request, known)(*args, **kwargs)
        return whole - out

    def _chain_of(self, name: str) -> tuple[Adapter, ...]:
        self._site._routing.check_name(name)
        chain = self._site.chain((name,))
        if self.request.rows is not None:
            self._site.check_rowwise(chain)
        return chain

    def params(self) -> Params:
        """Effective weights of the layer and every adapter further in.

        Raises `MergeError` where one of those adapters has no weight form.
        """
        params = self.layer.params()
        for adapter in self.inner:
            params = adapter.effective(params)
        return params


class Known:
    """What the adapters `inner` and their layer give for some arguments."""

    __slots__ = ("args", "inner", "kwargs", "out")

    def __init__(self, inner: tuple[Adapter, ...], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.inner = inner
        self.args = args
        self.kwargs = kwargs
        self.out = out

    def is_of(self, inner: tuple[Adapter, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return (
            len(inner) == len(self.inner)
            and len(args) == len(self.args)
            and kwargs.keys() == self.kwargs.keys()
            and all(one is other for one, other in zip(args, self.args, strict=True))
            and all(value is self.kwargs[name] for name, value in kwargs.items())
        )

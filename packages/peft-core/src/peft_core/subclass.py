"""The dynamic subclass that makes a user's model a `PeftModel` without wrapping it.

It carries the name and module of the user's class, is made once per class, and is never stacked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .routing import Routing, remembering, remembers

BASE_CLASS = "_peft_base_class"


def adapted_class(cls: type) -> type:
    """The subclass of `cls` with the methods of `PeftModel`."""
    return cls if hasattr(cls, BASE_CLASS) else _make(cls)


@functools.cache
def _make(cls: type) -> type:
    from .model import PeftModel
    from .overrides import OVERRIDES

    maker: Any = cls

    @functools.wraps(maker.__init__)
    def new(adapted: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)  # a model made anew has no adapters: it is of the user's class

    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__new__": new,
        BASE_CLASS: cls,
    }
    for name, override in OVERRIDES.items():
        if hasattr(cls, name):
            namespace[name] = _with_signature_of(getattr(cls, name), override)
    return type(cls.__name__, (PeftModel, cls), namespace)


def _with_signature_of(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return override


def base_class(cls: type) -> type:
    """The user's own class."""
    found: type = getattr(cls, BASE_CLASS, cls)
    return found


def rebuild(cls: type) -> Any:
    """An empty instance for `copy` and `pickle` to fill."""
    make: Any = cls.__new__
    return make(adapted_class(cls))


def remember_checkpoints(model: nn.Module, routing: Routing | None) -> None:
    """Let every block's activation checkpointing carry the request into its recompute (None: no longer)."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            plain = remembers(function)
            module.__dict__["_gradient_checkpointing_func"] = remembering(routing, plain) if routing else plain

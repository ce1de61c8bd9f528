"""The dynamic subclass that makes a user's model a `PeftModel` without wrapping it.

It carries the name and module of the user's class, is made once per class, and is never stacked.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .routing import Routing, remembering, remembers

BASE_CLASS = "_peft_base_class"


def adapted_class(cls: type) -> type:
    """The subclass of `cls` with the methods of `PeftModel`."""
    return cls if hasattr(cls, BASE_CLASS) else _make(cls)


@functools.cache
def _make(cls: type) -> type:
    from .model import PeftModel, generate

    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        BASE_CLASS: cls,
    }
    if hasattr(cls, "generate"):

        @functools.wraps(cls.generate)
        def generate_with_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
            return generate(self, *args, **kwargs)

        namespace["generate"] = generate_with_adapters
    return type(cls.__name__, (PeftModel, cls), namespace)


def base_class(cls: type) -> type:
    """The user's own class."""
    found: type = getattr(cls, BASE_CLASS, cls)
    return found


def rebuild(cls: type) -> Any:
    """An empty instance for `copy` and `pickle` to fill."""
    adapted: Any = adapted_class(cls)
    return adapted.__new__(adapted)


def remember_checkpoints(model: nn.Module, routing: Routing | None) -> None:
    """Let every block's activation checkpointing carry the request into its recompute (None: no longer)."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            plain = remembers(function)
            module.__dict__["_gradient_checkpointing_func"] = remembering(routing, plain) if routing else plain

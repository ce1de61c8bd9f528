"""The dynamic subclass that makes a user's model a `PeftModel` without wrapping it.

It carries the name and module of the user's class, is made once per class, and is never stacked.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .bare import ROOT, SHARED
from .calls import parameter_names
from .routing import Routing, remembering, remembers

BASE_CLASS = "_peft_base_class"
ARGUMENTS = "_peft_request_arguments"
FORWARD_NAMES = "_peft_forward_names"


def adapted_class(cls: type, arguments: tuple[str, ...] = ()) -> type:
    """The subclass of the user's class with the methods of `PeftModel`; its forward names the request arguments."""
    return _make(base_class(cls), arguments)


@functools.cache
def _make(cls: type, arguments: tuple[str, ...]) -> type:
    from .model import PeftModel
    from .overrides import OVERRIDES, forward_of_request

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
        ARGUMENTS: arguments,
        FORWARD_NAMES: _names(cls),
    }
    if arguments:
        override = _with_signature_of(cls.forward, forward_of_request)  # type: ignore[attr-defined]
        override.__signature__ = _with_arguments(cls.forward, arguments)  # type: ignore[attr-defined]
        namespace["forward"] = override
    for name, override in OVERRIDES.items():
        if hasattr(cls, name):
            namespace[name] = _with_signature_of(getattr(cls, name), override)
    if issubclass(cls, (nn.Sequential, nn.ModuleList)):  # these run, or give, all that is registered in them
        namespace |= {
            "__iter__": lambda self: iter(_own_children(self)),
            "__len__": lambda self: len(_own_children(self)),
        }
    return type(cls.__name__, (PeftModel, cls), namespace)


def _own_children(model: nn.Module) -> list[Any]:
    return [child for name, child in model._modules.items() if name not in (ROOT, SHARED)]


def _with_signature_of(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return override


def _with_arguments(forward: Callable[..., Any], arguments: tuple[str, ...]) -> inspect.Signature:
    """The signature of a forward with more keywords: whoever picks a model's inputs by it keeps them."""
    signature = inspect.signature(forward)
    found = list(signature.parameters.values())
    at = next((i for i, p in enumerate(found) if p.kind is p.VAR_KEYWORD), len(found))
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in arguments]
    found[at:at] = [parameter for parameter in more if parameter.name not in signature.parameters]
    return signature.replace(parameters=found)


def _names(cls: Any) -> tuple[str, ...]:
    try:
        return parameter_names(cls.forward)
    except (TypeError, ValueError):  # a forward that is not written in Python
        return ()


def forward_names(cls: type) -> tuple[str, ...]:
    """The names of the parameters of the user's own forward. Noted on the class: no compiled graph looks for them."""
    found: tuple[str, ...] = getattr(cls, FORWARD_NAMES)
    return found


def base_class(cls: type) -> type:
    """The user's own class."""
    found: type = getattr(cls, BASE_CLASS, cls)
    return found


def rebuild(cls: type, arguments: tuple[str, ...] = ()) -> Any:
    """An empty instance for `copy` and `pickle` to fill."""
    make: Any = cls.__new__
    return make(adapted_class(cls, arguments))


def remember_checkpoints(model: nn.Module, routing: Routing | None) -> None:
    """Let every block's activation checkpointing carry the request into its recompute (None: no longer)."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            plain = remembers(function)
            module.__dict__["_gradient_checkpointing_func"] = remembering(routing, plain) if routing else plain

"""Calling a module with other weights, without touching it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import offload
from .bare import bare


def shadowed(module: nn.Module, params: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of `module` that sees `params` as its parameters (nested names allowed).

    Nothing of the original is written, so other threads and a later recompute see the original weights. Values
    may be any object that behaves like a tensor under the torch function protocol. Adapters inside stand on the copy.
    """
    base = bare(module)
    if base is not module:
        return _site_on(module, shadowed(base, params))
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__ = dict(module.__dict__)
    own = {name: value for name, value in params.items() if "." not in name}
    clone.__dict__["_parameters"] = {**module._parameters, **own}
    children: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        head, dot, rest = name.partition(".")
        if dot:
            children.setdefault(head, {})[rest] = value
    if children:
        modules = {head: shadowed(module._modules[head], nested) for head, nested in children.items()}
        clone.__dict__["_modules"] = {**module._modules, **modules}
    offload.rebind(module, clone)
    return clone


def _site_on(site: Any, base: nn.Module) -> nn.Module:
    """A copy of a site that stands on another module."""
    clone: Any = object.__new__(type(site))
    clone.__dict__ = dict(site.__dict__)
    clone.__dict__["_modules"] = {**site._modules, "base_layer": base}
    clone.__dict__["_layer"] = copy.copy(site._layer)
    clone._layer.module = base
    return clone  # type: ignore[no-any-return]

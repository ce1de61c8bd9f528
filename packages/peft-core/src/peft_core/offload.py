"""Modules whose weights accelerate keeps elsewhere (on disk, say) between calls: what they are, and where they run.

Told by the hook that accelerate leaves on the module, so that neither accelerate nor its version matters here.
"""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None where its weights are with it."""
    hook = _offloading(module)
    return None if hook is None else torch.device(hook.execution_device)


def value_of(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The value of the module's own parameter `name`, fetched to where the module computes."""
    hook = _offloading(module) if parameter.is_meta else None
    if hook is None:
        return parameter
    value: Tensor = hook.weights_map[name]
    return value.to(device=torch.device(hook.execution_device), dtype=parameter.dtype)


def rebind(original: nn.Module, clone: nn.Module) -> None:
    """Let what was put on a module in place of its `forward` work on a shallow copy, and keep the copy's weights."""
    for name in ("forward", "_old_forward"):
        function = clone.__dict__.get(name)
        if isinstance(function, MethodType) and function.__self__ is original:
            clone.__dict__[name] = MethodType(function.__func__, clone)
        elif isinstance(function, functools.partial) and function.args[:1] == (original,):
            clone.__dict__[name] = functools.partial(function.func, clone, *function.args[1:], **function.keywords)
    if _offloading(original) is not None:
        clone.__dict__["_hf_hook"] = _staying(original.__dict__["_hf_hook"])


def _offloading(module: nn.Module) -> Any | None:
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return None
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one
    return None


def _staying(hook: Any) -> Any:
    """The hook, moving inputs as before, but no weights."""
    same = copy.copy(hook)
    if hasattr(hook, "hooks"):
        same.hooks = tuple(_staying(one) for one in hook.hooks)
    elif hasattr(hook, "offload"):
        same.offload = False
    return same

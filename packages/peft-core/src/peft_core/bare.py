"""A module's parameters by the names they have without adapters, whatever sits inside the module by now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

SHARED = "_peft_shared"
"""Child module of the model that holds the adapters' shared tensors."""

ROOT = "_peft_root"
"""Child module of the model that holds the adapters around the model itself."""


def bare(module: Any) -> Any:
    """The module that a site stands for, or the module itself."""
    from .site import Site

    return module.base_layer if isinstance(module, Site) else module


def base_parameter_names(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of all parameters in a module, every name of those with several."""
    yield from (prefix + name for name, parameter in module._parameters.items() if parameter is not None)
    for name, child in module._modules.items():
        if child is not None and name not in (SHARED, ROOT):
            yield from base_parameter_names(bare(child), f"{prefix}{name}.")


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the tensor of that name, and its attribute. Raises `AttributeError`."""
    *path, attribute = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module {part!r}")
        module = bare(child)
    return module, attribute


def name_inside(module: nn.Module, name: str) -> str:
    """The name under which the tensor of that name is registered now."""
    *path, attribute = name.split(".")
    found: list[str] = []
    for part in path:
        child: Any = module._modules[part]
        module = bare(child)
        found += [part] if module is child else [part, "base_layer"]
    return ".".join([*found, attribute])

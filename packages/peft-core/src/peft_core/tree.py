"""The model as it is without adapters: one walk over the base modules, whatever sits at their places."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from .bare import ROOT, SHARED
from .site import Site


@dataclass
class Tree:
    """Base modules by path, every place (parent, attribute) each one is registered at, and the sites."""

    modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    places: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)

    def module(self, path: str) -> nn.Module | None:
        """The base module at `path`, or None."""
        return self._by_path.get(path)

    def parent(self, module: nn.Module) -> nn.Module | None:
        """The base module that `module` is registered in, the first one found."""
        places = self.places.get(id(module))
        return places[0][0] if places else None

    def ancestors(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that contain `module`, nearest first."""
        while (parent := self.parent(module)) is not None:
            yield parent
            module = parent

    def parameters(self, *, every_name: bool = False) -> dict[str, nn.Parameter]:
        """The base's own parameters under their original names, each once, or under every name that it has."""
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for path, module in self.modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and (every_name or id(parameter) not in seen):
                    seen.add(id(parameter))
                    found[f"{path}.{name}" if path else name] = parameter
        return found

    @functools.cached_property
    def _by_path(self) -> dict[str, nn.Module]:
        return dict(self.modules)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by path, as they are without any adapters: itself under the empty path, each once."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for path, module in walk(model).modules:
        if id(module) not in seen:
            seen.add(id(module))
            found[path] = module
    return found


def walk(model: nn.Module, instead: Mapping[str, nn.Module] | None = None) -> Tree:
    """Walk once. A module registered twice is listed under each path, its children under the first.

    `instead` gives modules that are to be seen at some paths in place of those that are there.
    """
    tree = Tree()
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        tree.modules.append((path, module))
        if id(module) in seen:
            continue
        seen.add(id(module))
        dot = f"{path}." if path else ""
        children = []
        for name, child in module._modules.items():
            if child is None:
                continue
            if module is model and name in (SHARED, ROOT):
                if isinstance(child, Site):
                    tree.sites[""] = child
                continue
            child = (instead or {}).get(dot + name, child)
            base = child
            if isinstance(child, Site):
                tree.sites[dot + name] = child
                base = child.base_layer
            tree.places.setdefault(id(base), []).append((module, name))
            children.append((dot + name, base))
        stack.extend(reversed(children))
    return tree

"""Putting a built adapter into the model, and taking it out: pointer swaps that are undone on any failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .bare import ROOT, SHARED
from .layers import BaseLayer, SiteRequest
from .planning import Draft, view
from .recorders import give_back
from .records import PeftState
from .root import RootSite
from .site import Site
from .subclass import remember_checkpoints
from .transaction import Undo
from .tree import Tree, walk


def attach(model: nn.Module, state: PeftState, draft: Draft, undo: Undo) -> None:
    """Put a draft's adapters at their sites and record them; `undo` learns how to take it back."""
    record = draft.record
    if record.structure is not None:
        _rebuild(model, state, draft, undo)
    for layer, adapter in zip(draft.layers, record.adapters, strict=True):
        path = layer.request.path
        site = state.sites.get(path)
        if site is None:
            bare = view(draft.tree, SiteRequest(path))
            site = Site(bare, state.routing) if path else RootSite(bare, state.routing)
            _place(model, draft.tree, layer, site, state, undo)
            state.sites[path] = site
        undo.keep(site._chains)
        undo.keep(site.adapters._modules)
        site.attach(record.name, layer.request.part, adapter)
    undo.keep(model._modules)
    if any(True for _ in (*record.shared.parameters(), *record.shared.buffers())):
        container = model._modules.get(SHARED)
        if container is None:
            container = model._modules[SHARED] = nn.Module()
        undo.keep(container._modules)
        container._modules[record.name] = record.shared
    record.shared.train(model.training)
    state.adapters[record.name] = record
    state.note_adapters()


def detach(model: nn.Module, state: PeftState, name: str, undo: Undo) -> None:
    """Take one adapter out; modules that no adapter sits at any more come back to their places."""
    record = state.record(name)
    tree = walk(model)
    for request in record.requests:
        site = state.sites.get(request.path)
        if site is None:
            continue
        undo.keep(site._chains)
        undo.keep(site.adapters._modules)
        site.detach(name)
        if not site.names():
            undo.keep(site.base_layer._forward_hooks)
            give_back(site.base_layer)
            if request.path:
                _replace(tree, site.base_layer, site.base_layer, undo)
            else:
                undo.keep(model._modules)
                del model._modules[ROOT]
            del state.sites[request.path]
    for parent, attribute, module in reversed(record.replaced):
        undo.keep(parent._modules)
        parent._modules[attribute] = module
    if record.config_before:
        undo.keep(model.config.__dict__)
        _configure(model, record.config_before)
    undo.keep(model._modules)
    container = model._modules.get(SHARED)
    if container is not None:
        undo.keep(container._modules)
        container._modules.pop(name, None)
        if not container._modules:
            del model._modules[SHARED]
    del state.adapters[name]
    state.note_adapters()


def _rebuild(model: nn.Module, state: PeftState, draft: Draft, undo: Undo) -> None:
    """Put the structure's modules at their places, frozen as the base is."""
    record, structure = draft.record, draft.record.structure
    assert structure is not None
    replaced = []
    for path, module in structure.modules.items():
        for parameter in module.parameters():
            if parameter.requires_grad:
                undo.add(lambda parameter=parameter: parameter.requires_grad_(True))  # type: ignore[misc]
                parameter.requires_grad_(False)
        head, _, attribute = path.rpartition(".")
        parent = draft.tree.module(head)
        assert parent is not None
        replaced.append((parent, attribute, parent._modules[attribute]))
        undo.keep(parent._modules)
        parent._modules[attribute] = module
        remember_checkpoints(module, state.routing)
    config: Any = model.config if structure.config else None
    record.replaced = replaced  # type: ignore[assignment]
    record.config_before = {name: getattr(config, name) for name in structure.config}
    if structure.config:
        undo.keep(config.__dict__)
        _configure(model, structure.config)


def _configure(model: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(model.config, name, value)


def _place(model: nn.Module, tree: Tree, layer: BaseLayer, site: Site, state: PeftState, undo: Undo) -> None:
    module = layer.module
    if not layer.path:
        undo.keep(model._modules)
        model._modules[ROOT] = site
        return
    _replace(tree, module, site, undo)
    for parent in tree.ancestors(module):
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused kernel for inference reads weights past the modules; it stands back where hooks are present.
            site.register_forward_pre_hook(stand_in_the_way)
        elif isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            # Nested tensors are for that kernel alone.
            undo.add(lambda parent=parent: setattr(parent, "use_nested_tensor", True))  # type: ignore[misc]
            parent.use_nested_tensor = False
            state.unnested.append(parent)


def stand_in_the_way(module: nn.Module, args: object) -> None:
    """A hook that does nothing but be there."""


def _replace(tree: Tree, module: nn.Module, by: nn.Module, undo: Undo) -> None:
    for parent, attribute in tree.places[id(module)]:
        old = parent._modules[attribute]
        undo.add(lambda parent=parent, attribute=attribute, old=old: parent._modules.update({attribute: old}))  # type: ignore[misc]
        parent._modules[attribute] = by

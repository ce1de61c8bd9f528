"""How a model becomes adapted, how it gains an adapter, and how it is left as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from . import trainer
from .adapter_names import check_name
from .config import AdapterConfig
from .errors import AdapterNameError, AdapterNotFoundError, MergeError
from .inject import attach, detach
from .planning import Draft, draft
from .records import AdapterRecord, AdapterState, PeftState, state_of
from .subclass import adapted_class, base_class, remember_checkpoints
from .transaction import Undo
from .tree import Tree, walk


def checked_draft(
    model: nn.Module,
    name: str,
    config: AdapterConfig,
    float32: bool,
    revision: str | None,
    *,
    calibration: Iterable[Any] | None = None,
    start: AdapterState | None = None,
) -> Draft:
    state = state_of(model)
    require_free(state, name)
    if state is not None:
        require_unmerged(state, "adding an adapter")
    check_references(state, name, config)
    base = getattr(model, "name_or_path", None) or None
    known = {"base_model_name_or_path": config.base_model_name_or_path or base, "revision": revision or config.revision}
    found = draft(model, name, config.resolve(**known), float32=float32, start=start, calibration=calibration)
    found.check()
    return found


def require_free(state: PeftState | None, name: str) -> None:
    """Raise `AdapterNameError` where a new adapter cannot have that name."""
    check_name(name)
    if state is not None and name in state.adapters:
        raise AdapterNameError(
            f"adapter {name!r} is on the model already; choose another name, or delete_adapter({name!r}) first"
        )


def check_references(state: PeftState | None, name: str, config: AdapterConfig) -> None:
    """Raise where an adapter would be made of others that the model does not have, or that are made of it."""
    present = state.adapters if state else {}
    if circular := [other for other in config.refers_to() if state and name in state.made_of(other)]:
        raise AdapterNameError(
            f"adapter {name!r} would be made of {circular}, and so of itself; give it another name, or name other "
            "adapters in its config"
        )
    if missing := [other for other in config.refers_to() if other not in present]:
        raise AdapterNotFoundError(
            f"adapter {name!r} is made of other adapters, and the model lacks {missing}; it has "
            f"{list(present) or 'none'}. Add or load those first, under these names"
        )


def install(model: nn.Module, found: Draft, *, trainable: bool, activate: bool, instead: str | None = None) -> None:
    """Attach a checked draft, in place of the adapter `instead`; on a bare model, freeze it and exchange its class."""
    present = state_of(model)
    state = present or PeftState()
    record = found.record
    record.trainable = trainable
    with Undo() as undo:
        undo.keep_state(state)
        if present is None:
            enter(model, walk(model) if record.structure else found.tree, state, undo)
        if instead is not None:
            detach(model, state, instead, undo)
        attach(model, state, found, undo)
        name_arguments(model, state, undo)
        record.require_grad(trains(state, record.name))
        if activate:
            activate_records(state, [record], undo)


def activate_records(
    state: PeftState, records: list[AdapterRecord], undo: Undo, *, inference_mode: bool = False
) -> None:
    """Make these adapters active, with `undo.keep_state` done by the caller; tensors require gradients accordingly."""
    touched = [*state.active, *(record.name for record in records)]
    state.active = tuple(record.name for record in records)
    for name in with_referred(state, touched):
        undo.keep_flags(state.adapters[name])
        state.adapters[name].require_grad(trains(state, name) and not inference_mode)
    state.publish()


def with_referred(state: PeftState, names: Iterable[str]) -> list[str]:
    """These adapters, and those that train along with them."""
    found: dict[str, None] = {}
    for name in names:
        config = state.adapters[name].config
        found |= dict.fromkeys((name, *(config.refers_to() if config.trains_referred else ())))
    return list(found)


def trains(state: PeftState, name: str) -> bool:
    """Whether an adapter is active and trainable, or trains along with one that is."""
    trainable = [other for other in state.active if state.adapters[other].trainable]
    return name in with_referred(state, trainable)


def enter(model: nn.Module, tree: Tree, state: PeftState, undo: Undo) -> None:
    """Freeze the base and make the model a `PeftModel`."""
    thawed = [(name, parameter) for name, parameter in tree.parameters().items() if parameter.requires_grad]
    state.thawed = frozenset(name for name, _ in thawed)
    cls = type(model)
    undo.keep(model.__dict__)
    undo.add(lambda: setattr(model, "__class__", cls))
    undo.add(lambda: [parameter.requires_grad_(True) for _, parameter in thawed])
    undo.add(lambda: remember_checkpoints(model, None))
    for _, parameter in thawed:
        parameter.requires_grad_(False)
    model.__dict__["_peft"] = state
    model.__class__ = adapted_class(cls)
    remember_checkpoints(model, state.routing)
    trainer.install()


def name_arguments(model: nn.Module, state: PeftState, undo: Undo) -> None:
    """Let the model's class, and so its forward's signature, name the request arguments of the present adapters."""
    cls = type(model)
    wanted = adapted_class(cls, state.routing.arguments)
    if wanted is not cls:
        undo.add(lambda: setattr(model, "__class__", cls))
        model.__class__ = wanted


def leave(model: nn.Module, state: PeftState, undo: Undo) -> None:
    """Take every adapter out and make the model what it was."""
    cls = type(model)
    undo.keep(model.__dict__)
    undo.add(lambda: setattr(model, "__class__", cls))
    undo.add(lambda: remember_checkpoints(model, state.routing))
    for name in reversed(list(state.adapters)):  # one that changed the model's build came first, and goes last
        detach(model, state, name, undo)
    remember_checkpoints(model, None)
    thawed = [p for name, p in walk(model).parameters().items() if name in state.thawed]
    undo.add(lambda: [parameter.requires_grad_(False) for parameter in thawed])
    for parameter in thawed:
        parameter.requires_grad_(True)
    for encoder in state.unnested:
        undo.add(lambda encoder=encoder: setattr(encoder, "use_nested_tensor", False))  # type: ignore[misc]
        encoder.use_nested_tensor = True  # type: ignore[assignment]
    model.__class__ = base_class(cls)
    del model.__dict__["_peft"]


def require_unmerged(state: PeftState, action: str) -> None:
    if state.routing.merged:
        raise MergeError(
            f"{action}: adapters {list(state.routing.merged)} are merged into the base weights; call unmerge_adapter() "
            "first"
        )


def note_ties(model: nn.Module, undo: Undo) -> None:
    """Merging into one of two tied tables opens the tie; the model's config must then say so."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if output is not None and inputs is not None and output.weight is not inputs.weight:
        undo.add(lambda: setattr(config, "tie_word_embeddings", True))
        config.tie_word_embeddings = False

"""Calling hooks and checking what they return, where they return it.

Core code asks plugins through `call` and `call_extensions` only. What comes back has the type that the hook's
specification promises, or a `MethodContractError` names the plugin, the hook and what was returned instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import MethodContractError, add_note
from .suggest import shown

if TYPE_CHECKING:
    from .methods import Method


SILENT = ("peft_prepare",)
"""Hooks that return nothing."""


def call(method: Method, hook_name: str, **kwargs: Any) -> Any:
    """Call a hook of one method, the wrappers of extensions included, and return the checked result.

    `peft_sites` gives one flat list and the hooks in `SILENT` give None; every other hook gives its single result.
    An exception of the plugin passes through as it is, with a note that names the plugin, the hook, and the site.

    Raises:
        MethodContractError: the result is not of the promised type.
    """
    from .extensions import extensions

    extensions.wrap(method.manager)
    try:
        result = getattr(method.hook, hook_name)(**kwargs)
    except Exception as error:
        add_note(error, f"Raised in {hook_name}{_at(kwargs)}, called for the {method.label}.")
        raise
    wrapped_by = extensions.wrapping(hook_name)
    try:
        return check_result(hook_name, result, method.label, wrapped_by=wrapped_by)
    except MethodContractError as error:
        if at := _at(kwargs):
            add_note(error, f"It was asked{at}.")
        raise


def call_extensions(hook_name: str, **kwargs: Any) -> Any:
    """Ask all installed extensions and return the checked result; a `firstresult` hook may give None.

    Raises:
        MethodContractError: an extension returned something that is not of the promised type.
        MethodError: an installed extension cannot be loaded.
    """
    from .extensions import extensions

    try:
        result = getattr(extensions.hook, hook_name)(**kwargs)
    except Exception as error:
        asked = ", ".join(extensions.names())
        add_note(error, f"Raised in {hook_name}{_at(kwargs)}, asked of the extensions: {asked}.")
        raise
    try:
        return check_result(hook_name, result, "installed extensions")
    except MethodContractError:
        # These hooks only look, so they can be asked again, one extension at a time, to find the culprit.
        for label, hook in extensions.one_by_one(hook_name):
            check_result(hook_name, hook(**kwargs), label)
        raise


def _at(kwargs: Mapping[str, Any]) -> str:
    """The site that a hook was asked about, for messages."""
    layer = getattr(kwargs.get("adapter"), "layer", kwargs.get("layer"))
    path = kwargs.get("path") if layer is None else layer.path
    return f" at {str(path) or 'the model itself'}" if path is not None else ""


def check_result(hook_name: str, result: Any, label: str, wrapped_by: str = "") -> Any:
    """Return `result`, flattened where the specification says so, if it is what `hook_name` promises."""
    promise, accept = CHECKS[hook_name]
    if hook_name in (*SILENT, "peft_sites", "peft_architectures"):
        wrong = [item for item in result if not accept(item)]
    else:
        wrong = [] if accept(result) else [result]
    if wrong:
        also = f" It is wrapped by {wrapped_by}." if wrapped_by else ""
        raise MethodContractError(
            f"The {label} returned {_described(wrong[0])} from {hook_name}.\nThe hook returns {promise}.{also}"
        )
    if hook_name == "peft_sites":
        return [request for requests in result for request in requests]
    return None if hook_name in SILENT else result


def _described(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if value is None or isinstance(value, bool | int | float | str):
        return f"{shown(value)} ({type(value).__name__})" if value is not None else "None"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} that starts with {_described(value[0])}"
    if isinstance(value, dict) and value:
        key, item = next(iter(value.items()))
        return f"a dict that starts with {shown(key)}: {_described(item)}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


# The types are imported on use: this module is read before, and without, the torch half of the core.


def _is_config(value: object) -> bool:
    from .config import AdapterConfig

    return isinstance(value, type) and issubclass(value, AdapterConfig) and value is not AdapterConfig


def _is_config_object(value: object) -> bool:
    from .config import AdapterConfig

    return isinstance(value, AdapterConfig)


def _is_structure(value: object) -> bool:
    from torch import nn

    from .records import Structure

    return value is None or (
        isinstance(value, Structure)
        and isinstance(value.modules, Mapping)
        and all(isinstance(k, str) and isinstance(m, nn.Module) for k, m in value.modules.items())
    )


def _is_sites(value: object) -> bool:
    from .layers import SiteRequest

    return isinstance(value, list | tuple) and all(isinstance(item, SiteRequest) for item in value)


def _is_adapter(value: object) -> bool:
    from .adapter import Adapter

    return isinstance(value, Adapter)


def _is_state(value: object) -> bool:
    from .records import AdapterState

    if value is None:
        return True
    return (
        isinstance(value, AdapterState)
        and _is_config_object(value.config)
        and isinstance(value.tensors, Mapping)
        and all(isinstance(path, str) and _is_tensors(dict(found)) for path, found in value.tensors.items())
        and _is_tensors(dict(value.shared))
    )


def _is_groups(value: object) -> bool:
    from torch import nn

    return value is None or (
        isinstance(value, list)
        and all(
            isinstance(group, dict)
            and isinstance(group.get("params"), list)
            and all(isinstance(parameter, nn.Parameter) for parameter in group["params"])
            for group in value
        )
    )


def _is_layer(value: object) -> bool:
    from .layers import BaseLayer

    return value is None or isinstance(value, BaseLayer)


def _is_tensors(value: object) -> bool:
    from torch import Tensor

    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()
    )


def _is_checkpoint(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], dict) and _is_tensors(value[1])


def _is_roles(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(model_type, str)
        and isinstance(roles, Mapping)
        and all(
            isinstance(role, str) and isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            for role, names in roles.items()
        )
        for model_type, roles in value.items()
    )


# What each hook promises, in words and as a test. The specifications and this table have the same keys.
CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_config": ("a subclass of peft_core.AdapterConfig (the class, not an instance)", _is_config),
    "peft_match": ("True, False, or None (the core's own rule)", lambda v: v is None or isinstance(v, bool)),
    "peft_resolve": ("a config, as `config.resolve(...)` gives it", _is_config_object),
    "peft_structure": ("a peft_core.Structure (modules by path), or None", _is_structure),
    "peft_sites": ("a list of peft_core.SiteRequest", _is_sites),
    "peft_prepare": ("nothing; tensors go into `shared`", lambda v: v is None),
    "peft_build": ("an instance of peft_core.Adapter", _is_adapter),
    "peft_merge": ("a dict of tensors by parameter name", _is_tensors),
    "peft_state_key": ("a non-empty string", lambda v: isinstance(v, str) and bool(v)),
    "peft_calibrate": ("a peft_core.AdapterState (config and tensors), or None", _is_state),
    "peft_combine": ("a peft_core.AdapterState (config and tensors), or None", _is_state),
    "peft_step": (
        "a config, as `config.resolve(...)` gives it, or None",
        lambda v: v is None or _is_config_object(v),
    ),
    "peft_param_groups": ("a list of dicts that each have a list `params`, or None", _is_groups),
    "peft_layer": ("an instance of peft_core.BaseLayer, or None if the module is not its own", _is_layer),
    "peft_architectures": ("a mapping {model_type: {role: [module names]}}", _is_roles),
    "peft_checkpoint": ("a tuple (config dict, dict of tensors by key), or None", _is_checkpoint),
    "peft_export": ("True where it wrote the files, or None", lambda v: v is None or v is True),
}

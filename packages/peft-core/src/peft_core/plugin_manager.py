"""Importing one plugin and registering it with a pluggy manager, so that a failure leaves nothing behind."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pluggy

from .discovery import Entry
from .errors import MethodContractError, MethodImportError
from .hookspecs import PROJECT, ExtensionSpecs, MethodSpecs
from .suggest import did_you_mean

TRACE_VARIABLE = "PEFT_TRACE_HOOKS"
METHOD_HOOKS = tuple(name for name in vars(MethodSpecs) if name.startswith("peft_"))
EXTENSION_HOOKS = tuple(name for name in vars(ExtensionSpecs) if name.startswith("peft_"))


def new_manager(label: str, *specs: type) -> pluggy.PluginManager:
    """A manager with the hooks of `specs`; its calls are printed where `PEFT_TRACE_HOOKS` is set."""
    manager = pluggy.PluginManager(PROJECT)
    for spec in specs:
        manager.add_hookspecs(spec)
    if os.environ.get(TRACE_VARIABLE, "") not in ("", "0"):
        _trace(manager, label)
    return manager


def import_plugin(entry: Entry) -> object:
    """Import what an entry point names, and nothing else of its package.

    Raises:
        MethodImportError: whatever the module raised; modules it had brought in are taken out again.
    """
    attribute = entry.value.partition("[")[0].partition(":")[2].strip()
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(entry.module)
        plugin: object = module
        for name in attribute.split(".") if attribute else ():
            plugin = getattr(plugin, name)
        return plugin
    except (Exception, SystemExit) as error:
        raise MethodImportError(
            f"The {entry.label} cannot be imported: {type(error).__name__}: {error}\n"
            f"{_blame(error)}"
            f"Repair or reinstall {entry.source.distribution}; the other plugins are not affected."
        ) from error


def _blame(error: BaseException) -> str:
    """The line that raised; empty where the import system itself did."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    last = frames[-1] if frames else None
    if last is None or last.filename == __file__:
        return ""
    return f"It was raised in {last.filename}, line {last.lineno}.\n"


class UndoImports:
    """Takes a plugin's newly imported modules out of `sys.modules` if the block fails.

    A retry after a fix then reads the files anew. Modules of other packages stay: importing some of them
    twice is not safe.
    """

    def __init__(self, module: str) -> None:
        self.root = module.partition(".")[0]

    def __enter__(self) -> None:
        self.before = set(sys.modules)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            return
        for name in set(sys.modules) - self.before:
            if name.partition(".")[0] == self.root:
                module = sys.modules.pop(name)
                parent, _, child = name.rpartition(".")
                if vars(sys.modules.get(parent, object)).get(child) is module:
                    delattr(sys.modules[parent], child)


def register(
    manager: pluggy.PluginManager,
    plugin: object,
    name: str,
    label: str,
    *,
    own: Collection[str],
    wrappable: Collection[str] = (),
    elsewhere: str,
) -> None:
    """Register `plugin`, having checked every hook it implements; all problems are reported at once.

    Args:
        label: the plugin as messages name it.
        own: the hooks of this kind of plugin.
        wrappable: other hooks, which it may only wrap.
        elsewhere: why it may do no more than that, for the message.

    Raises:
        MethodContractError
    """
    problems = _problems(manager, plugin, own, wrappable, elsewhere)
    if not problems:
        try:
            manager.register(plugin, name)
            manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            problems = [str(error)]
    if problems:
        raise MethodContractError(f"The {label} breaks the hook contract.\n" + "\n".join(problems))


def implemented(manager: pluggy.PluginManager, plugin: object) -> dict[str, dict[str, Any]]:
    """Hooks that `plugin` implements: `{attribute: options of its marker}`."""
    found = ((name, manager.parse_hookimpl_opts(plugin, name)) for name in dir(plugin))
    return {name: dict(options) for name, options in found if options is not None}


def _problems(
    manager: pluggy.PluginManager,
    plugin: object,
    own: Collection[str],
    wrappable: Collection[str],
    elsewhere: str,
) -> list[str]:
    if inspect.isclass(plugin):
        return ["It is a class: pass an instance of it, so that its hooks have a `self`."]
    marked = implemented(manager, plugin)
    problems: list[str] = []
    for attribute, options in marked.items():
        name = options.get("specname") or attribute
        wraps = options.get("wrapper") or options.get("hookwrapper")
        if name in own or (name in wrappable and wraps):
            spec = getattr(manager.hook, name).spec
            problems += _argument_problems(name, getattr(plugin, attribute), tuple(spec.argnames))
        elif name in (*METHOD_HOOKS, *EXTENSION_HOOKS):
            problems.append(f"{name} cannot be implemented here: {elsewhere}.")
        elif not options.get("optionalhook"):
            problems.append(f"There is no hook {name!r}.{did_you_mean(name, own)}")
    home = getattr(plugin, "__name__", None) if inspect.ismodule(plugin) else type(plugin).__module__
    for name in own:
        function = inspect.getattr_static(plugin, name, None)
        if name not in marked and inspect.isfunction(function) and function.__module__ == home:
            problems.append(f"{name} lacks its marker: put @peft_core.hookimpl above it.")
    return problems


def _argument_problems(hook: str, function: Any, allowed: Sequence[str]) -> list[str]:
    problems = []
    has = f"{hook} has the arguments: {', '.join(allowed) or 'none'}"
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            problems.append(
                f"{hook} declares {str(parameter).partition(':')[0]!r}, which is never passed: "
                f"hooks receive the plain arguments they name. {has}."
            )
        elif parameter.default is not parameter.empty and name in allowed:
            problems.append(f"{hook} gives the argument {name!r} a default, so it is never passed: remove it.")
        elif parameter.default is parameter.empty and name not in allowed:
            problems.append(f"{hook} has no argument {name!r}.{did_you_mean(name, allowed)} {has}.")
    return problems


def _trace(manager: pluggy.PluginManager, label: str) -> None:
    def before(hook: str, impls: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        arguments = ", ".join(f"{name}={_brief(value)}" for name, value in kwargs.items())
        plugins = ", ".join(impl.plugin_name for impl in reversed(impls)) or "nobody"
        print(f"peft-core: {label}: {hook}({arguments}) asks {plugins}", file=sys.stderr)

    def after(outcome: pluggy.Result[Any], hook: str, impls: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        error = outcome.exception
        result = f"raised {type(error).__name__}: {error}" if error else f"-> {_brief(outcome.get_result())}"
        print(f"peft-core: {label}: {hook} {result}", file=sys.stderr)

    manager.add_hookcall_monitoring(before, after)


def _brief(value: object) -> str:
    """Short forms only: the `repr` of a model or a tensor would fill the screen."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value)}"
    layer = getattr(value, "layer", value)  # an adapter, or a layer itself
    path = getattr(layer, "path", None)
    return f"<{type(value).__qualname__}{f' at {path}' if isinstance(path, str) and path else ''}>"

"""Methods: looking one up by name, and registering one without packaging.

A method is a plugin with a pluggy manager of its own, which holds the core's defaults, the plugin's hooks and
the wrappers of installed extensions. A registration that fails is thrown away with its manager.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from . import discovery
from .discovery import METHODS, Entry, Source
from .errors import (
    MethodClashError,
    MethodContractError,
    MethodDisabledError,
    MethodError,
    MethodNotFoundError,
)
from .hookspecs import MethodSpecs
from .plugin_manager import (
    EXTENSION_HOOKS,
    METHOD_HOOKS,
    UndoImports,
    implemented,
    import_plugin,
    new_manager,
    register,
)
from .suggest import shown

if TYPE_CHECKING:
    from .config import AdapterConfig

# What a method cannot do without; the core's defaults have neither.
REQUIRED = ("peft_config", "peft_build")


@dataclass(frozen=True, eq=False)
class Method:
    """A loaded method. Calling it builds a config: `load_method("acme")(r=4)`.

    Copies are the object itself and pickles hold the name alone: a model that refers to its method can be
    copied and pickled, and finds the method again where it is installed or registered.
    """

    name: str
    source: Source
    hook: pluggy.HookRelay = field(repr=False)
    config_class: type[AdapterConfig]
    manager: pluggy.PluginManager = field(repr=False)
    plugin: object = field(repr=False)

    def __call__(self, **fields: Any) -> AdapterConfig:
        return self.config_class(**fields)

    @property
    def label(self) -> str:
        """The method as error messages name it."""
        return _label(self.name, self.source, self.plugin)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_method, (self.name,)

    def __copy__(self) -> Method:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return self


@dataclass(frozen=True)
class MethodInfo:
    """What metadata says about a method; the plugin is not imported.

    `problem` is the message of the error that loading it would raise, as far as metadata can tell.
    """

    name: str
    distribution: str | None
    version: str | None
    module: str | None
    problem: str | None = None


_lock = threading.RLock()
_registered: dict[str, Method] = {}
_loaded: dict[Entry, Method] = {}


def load_method(name: str, *, allow: Collection[str] | None = None, wrote_by: str | None = None) -> Method:
    """Return the method `name` (case is ignored), importing its module if this is the first use.

    Args:
        allow: the only names to accept, where `name` comes from a file.
        wrote_by: the distribution that a checkpoint names as its writer, for the message if there is no such
            method.

    Raises:
        MethodError: one of its subclasses for each thing that can be wrong; see docs/plugins.md.
    """
    if not isinstance(name, str) or not name:
        raise MethodNotFoundError(f"A method's name is a non-empty string, not {shown(name)}.")
    key = name.lower()
    allowed = (allow,) if isinstance(allow, str) else allow
    if allowed is not None and key not in {item.lower() for item in allowed}:
        raise MethodDisabledError(
            f"The method {shown(key)} is not on the allow list: {', '.join(sorted(allowed)) or 'none is'}.\n"
            "Nothing was imported. Add it to `allow` if you trust the plugin that provides it."
        )
    with _lock:
        if key in _registered:
            return _registered[key]
        entry = discovery.resolve(key, registered=_registered, wrote_by=wrote_by)
        if entry not in _loaded:
            with UndoImports(entry.module):
                _loaded[entry] = _assemble(import_plugin(entry), entry.source, entry.name)
        return _loaded[entry]


def register_method(plugin: object, *, replace: bool = False) -> Method:
    """Make a module or object with hook implementations available under its config's name, without packaging.

    For notebooks and tests. The method is known in this process only.

    Args:
        replace: take the place of a method of the same name, installed or registered.

    Raises:
        MethodContractError: the hooks are not right; nothing is left registered.
        MethodClashError: the name is taken.
    """
    with _lock:
        method = _assemble(plugin, Source(), None)
        taken = _registered.get(method.name) or next(
            (entry for entry in discovery.entries(METHODS) if entry.name == method.name), None
        )
        if taken is not None and not replace:
            raise MethodClashError(
                f"The name of the {method.label} is taken by the {taken.label}.\n"
                "Pass replace=True to use the new one in its place, or give its config another peft_type."
            )
        _registered[method.name] = method
        return method


def unregister_method(name: str) -> None:
    """Forget a method registered with `register_method`; an installed one of that name is used again.

    Raises:
        MethodNotFoundError: nothing was registered under `name`.
    """
    with _lock:
        if _registered.pop(name.lower(), None) is None:
            here = ", ".join(sorted(_registered)) or "none"
            raise MethodNotFoundError(
                f"No method {shown(name)} was registered at run time. Registered: {here}.\n"
                f"An installed method cannot be unregistered; {discovery.DISABLE_VARIABLE} disables it."
            )


def available_methods() -> dict[str, MethodInfo]:
    """All methods by name, installed and registered, from metadata alone: no plugin is imported."""
    found: dict[str, MethodInfo] = {}
    for listed in discovery.entries(METHODS):
        entry, problem = listed, None
        try:
            entry = discovery.resolve(listed.name)
        except MethodError as error:
            problem = str(error)
        source = entry.source
        found[entry.name] = MethodInfo(entry.name, source.distribution, source.version, entry.module, problem)
    for name, method in _registered.items():
        found[name] = MethodInfo(name, None, None, _place(method.plugin))
    return dict(sorted(found.items()))


def _place(plugin: object) -> str:
    return str(getattr(plugin, "__name__", None) or type(plugin).__qualname__)


def _label(name: str, source: Source, plugin: object) -> str:
    return f"method {name!r} ({source}, {_place(plugin)})"


def _assemble(plugin: object, source: Source, name: str | None) -> Method:
    """Build a method in a manager of its own; `name` is the entry point's, or None to take the config's."""
    from . import defaults
    from .hook_results import check_result

    label = _label(name, source, plugin) if name else f"method in {_place(plugin)} ({source})"
    manager = new_manager(name or _place(plugin), MethodSpecs)
    manager.register(defaults, "peft_core.defaults")
    register(
        manager,
        plugin,
        _place(plugin),
        label,
        own=METHOD_HOOKS,
        elsewhere=f"{', '.join(EXTENSION_HOOKS)} are hooks of extensions, group {discovery.EXTENSIONS}",
    )
    provided = {options.get("specname") or hook for hook, options in implemented(manager, plugin).items()}
    missing = [hook for hook in REQUIRED if hook not in provided]
    if missing:
        raise MethodContractError(
            f"The {label} does not implement {' and '.join(missing)}.\n"
            "Every method needs them: define a function of that name, marked with @peft_core.hookimpl."
        )
    try:
        result = manager.hook.peft_config()
    except Exception as error:
        raise MethodContractError(
            f"The {label} raised {type(error).__name__} in peft_config: {error}\n"
            "That hook returns the config class; it takes no arguments and should do nothing else."
        ) from error
    config_class: type[AdapterConfig] = check_result("peft_config", result, label)
    peft_type = getattr(config_class, "peft_type", None)
    if not isinstance(peft_type, str) or not peft_type or peft_type != (name or peft_type).upper():
        expected = repr(name.upper()) if name else "the method's name in upper case"
        raise MethodContractError(
            f"The {label} has a config class {config_class.__name__} whose peft_type is {shown(peft_type)}.\n"
            f"It must be {expected}: files hold the peft_type, and it is how they find the method again.\n"
            "Correct the class variable peft_type, or the name of the entry point."
        )
    return Method(name or peft_type.lower(), source, manager.hook, config_class, manager, plugin)

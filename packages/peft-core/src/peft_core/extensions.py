"""Extensions: plugins that serve every method. They add storage backends, architectures and foreign file
formats (`ExtensionSpecs`), and may wrap the hooks of methods (`@hookimpl(wrapper=True)`).

Installed ones are imported on first use. One that is broken is an error that names it, not a silent omission:
without its storage backend the numbers could be wrong.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pluggy

from .discovery import DISABLE_VARIABLE, EXTENSIONS, Entry, check_metadata, entries, is_disabled
from .errors import MethodClashError, MethodNotFoundError, PeftError
from .hookspecs import ExtensionSpecs, MethodSpecs
from .plugin_manager import (
    EXTENSION_HOOKS,
    METHOD_HOOKS,
    UndoImports,
    implemented,
    import_plugin,
    new_manager,
    register,
)

# A config's schema belongs to its method alone: files depend on it.
WRAPPABLE = tuple(hook for hook in METHOD_HOOKS if hook != "peft_config")


class _Wrappers:
    """The method hooks that one extension wraps, as a plugin of their own."""


class Extensions:
    """The manager of all extensions, filled with the installed ones on first use."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manager = new_manager("extensions", ExtensionSpecs, MethodSpecs)
        self._loaded = False
        self._entries: dict[str, Entry | None] = {}
        self._alone: dict[str, pluggy.PluginManager] = {}
        self._wrapped: weakref.WeakKeyDictionary[pluggy.PluginManager, set[str]] = weakref.WeakKeyDictionary()

    @property
    def hook(self) -> pluggy.HookRelay:
        """The relay of all extensions.

        Raises:
            MethodError: an installed extension cannot be loaded. The next use tries again.
        """
        self.load()
        return self._manager.hook

    def load(self) -> None:
        """Import and register the installed extensions; where one fails, those before it stay."""
        if self._loaded:
            return
        with self._lock:
            for entry in entries(EXTENSIONS):
                if not is_disabled(entry):
                    self.load_one(entry)
            self._loaded = True

    def load_one(self, entry: Entry) -> None:
        """Import and register one extension.

        Raises:
            MethodError: with the way to go on without it.
        """
        name = f"{entry.name} of {entry.source}"
        if name in self._entries:
            return
        try:
            check_metadata(entry)
            with UndoImports(entry.module):
                self._manager = self._with(import_plugin(entry), name, entry.label)
        except PeftError as error:
            raise type(error)(
                f"{error}\nTo go on without it, start Python with {DISABLE_VARIABLE}={entry.name}."
            ) from error
        self._entries[name] = entry

    def register(self, plugin: object, name: str) -> None:
        """Add an extension without packaging, for notebooks and tests.

        Raises:
            MethodClashError: the name is in use.
            MethodContractError: its hooks are not right; nothing is left registered.
        """
        with self._lock:
            if name in self._entries:
                raise MethodClashError(f"An extension {name!r} is registered already: unregister it first.")
            self._manager = self._with(plugin, name, f"extension {name!r} (registered at run time)")
            self._entries[name] = None

    def unregister(self, name: str) -> None:
        """Remove an extension added with `register`, its wrappers included.

        Raises:
            MethodNotFoundError: none was registered under that name.
        """
        with self._lock:
            if self._entries.get(name, name) is not None:
                raise MethodNotFoundError(f"No extension {name!r} was registered at run time.")
            del self._entries[name]
            self._manager.unregister(name=name)
            self._alone.pop(name, None)
            for manager, names in self._wrapped.items():
                if name in names:
                    names.discard(name)
                    manager.unregister(name=_wrapper_name(name))

    def names(self) -> list[str]:
        """Names of the extensions that are registered."""
        return list(self._entries)

    def wrapping(self, hook_name: str) -> str:
        """Names of the extensions that wrap a method hook, for messages."""
        impls = getattr(self._manager.hook, hook_name).get_hookimpls()
        return ", ".join(impl.plugin_name for impl in impls)

    def one_by_one(self, hook_name: str) -> Iterator[tuple[str, pluggy.HookCaller]]:
        """The callers of one hook for each extension alone, with the extension's name for messages."""
        for name, plugin in self._manager.list_name_plugin():
            entry = self._entries.get(name)
            label = entry.label if entry else f"extension {name!r} (registered at run time)"
            if name not in self._alone:  # pluggy's subset of a manager's plugins is for hashable ones
                self._alone[name] = new_manager(f"extension {name}", ExtensionSpecs, MethodSpecs)
                self._alone[name].register(plugin, name)
            yield label, getattr(self._alone[name].hook, hook_name)

    def wrap(self, manager: pluggy.PluginManager) -> None:
        """Put the wrappers of all extensions into a method's manager, those that are not there yet."""
        self.load()
        done = self._wrapped.get(manager)
        if done is not None and len(done) == len(self._entries):
            return
        with self._lock:
            done = self._wrapped.setdefault(manager, set())
            for name, plugin in self._manager.list_name_plugin():
                if name in done:
                    continue
                wrappers = _Wrappers()
                for attribute, options in implemented(self._manager, plugin).items():
                    if (options.get("specname") or attribute) in WRAPPABLE:
                        setattr(wrappers, attribute, getattr(plugin, attribute))
                manager.register(wrappers, _wrapper_name(name))
                done.add(name)

    def _with(self, plugin: object, name: str, label: str) -> pluggy.PluginManager:
        """A manager with all present extensions and one more.

        It is made anew: pluggy's `register` may fail half way and leave something behind.
        """
        manager = new_manager("extensions", ExtensionSpecs, MethodSpecs)
        for present, other in self._manager.list_name_plugin():
            manager.register(other, present)
        elsewhere = f"an extension may only wrap a method's hooks, {', '.join(WRAPPABLE)}, with wrapper=True"
        register(manager, plugin, name, label, own=EXTENSION_HOOKS, wrappable=WRAPPABLE, elsewhere=elsewhere)
        return manager


def _wrapper_name(name: str) -> str:
    return f"extension {name}"


extensions = Extensions()


def register_extension(plugin: object, name: str) -> None:
    """Add an extension without packaging: an object with marked hooks of `ExtensionSpecs`, or wrappers of a method's.

    Raises `MethodClashError` where the name is in use, `MethodContractError` where its hooks are not right.
    """
    extensions.register(plugin, name)


def unregister_extension(name: str) -> None:
    """Remove what `register_extension` added. Raises `MethodNotFoundError` where there is none of that name."""
    extensions.unregister(name)

"""Every exception the library raises, under one base.

A message says what is wrong, where (file, key, layer, plugin), why, and what to do about it.
"""

from __future__ import annotations


def add_note(error: BaseException, text: str) -> None:
    """Note on an error of somebody else's where it came through (from Python 3.11 on)."""
    if hasattr(error, "add_note"):
        error.add_note(text)


class PeftError(Exception):
    """Base of every error raised by peft-core and by well-behaved plugins."""


class ConfigError(PeftError, ValueError):
    """A configuration value, from the user or from a file, cannot be used."""


class TargetError(PeftError, ValueError):
    """A selection names something the model does not have, or something that cannot be adapted."""


class AdapterNameError(PeftError, ValueError):
    """An adapter name is malformed or already in use."""


class AdapterNotFoundError(PeftError, LookupError):
    """No adapter of that name is present on the model."""


class MethodError(PeftError):
    """Something is wrong with a plugin, method or extension; the message names it and its distribution."""


class MethodNotFoundError(MethodError, LookupError):
    """No installed or registered plugin provides the method."""


class MethodDisabledError(MethodError):
    """The plugin is switched off by the environment, or is not on the caller's allow list."""


class MethodClashError(MethodError):
    """Two distributions provide a method under the same name."""


class MethodVersionError(MethodError):
    """The plugin's distribution declares a range of peft-core that excludes the installed version."""


class MethodImportError(MethodError):
    """The plugin's module could not be imported."""


class MethodContractError(MethodError):
    """A plugin broke the hook contract: misspelt hook, unknown argument, or a wrong return value."""


class RequestError(PeftError, RuntimeError):
    """The arguments of one forward or generate call do not fit the model or the batch."""


class MergeError(PeftError, RuntimeError):
    """Adapters cannot be merged into, or taken out of, the base weights."""


class CombineError(PeftError, ValueError):
    """Adapters cannot be combined into a new one."""


class CheckpointError(PeftError):
    """An adapter checkpoint cannot be written or read."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint does not fit the model or its own config: missing, unknown, or mis-shaped tensors."""

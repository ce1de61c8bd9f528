"""Finding plugins by metadata alone. Nothing in this module imports a plugin.

A plugin is an entry point: in group `peft_core.methods` its name is a method's name, in group
`peft_core.extensions` it is a label. What is installed, what clashes, what is switched off and which versions
of peft-core a plugin accepts are all read from the distributions' metadata, once per process.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from .errors import (
    MethodClashError,
    MethodDisabledError,
    MethodImportError,
    MethodNotFoundError,
    MethodVersionError,
)
from .suggest import did_you_mean, shown

METHODS = "peft_core.methods"
EXTENSIONS = "peft_core.extensions"
DISABLE_VARIABLE = "PEFT_CORE_DISABLE_PLUGINS"
CORE = "peft-core"

# `package.module` or `package.module:object`, as the entry-point specification has it.
_VALUE = re.compile(r"[\w.]+\s*(:\s*[\w.]+\s*)?(\[.*\]\s*)?$")


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from: an installed distribution, or nothing but a call in this process."""

    distribution: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        if self.distribution is None:
            return "registered at run time"
        return f"{self.distribution} {self.version or '(no version)'}"


@dataclass(frozen=True)
class Entry:
    """One installed entry point, not imported."""

    group: str
    name: str
    value: str
    source: Source
    requires: tuple[str, ...] = field(default=(), repr=False)

    @property
    def module(self) -> str:
        return self.value.partition(":")[0].strip()

    @property
    def label(self) -> str:
        """The plugin as error messages name it."""
        kind = "method" if self.group == METHODS else "extension"
        return f"{kind} {self.name!r} ({self.source}, {self.value})"


@functools.cache
def core_version() -> str | None:
    """The installed version of peft-core; None where it runs from a bare source tree."""
    try:
        return metadata.version(CORE)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def entries(group: str) -> tuple[Entry, ...]:
    """All entry points of a group, names in lower case, cached until `refresh()`.

    A distribution whose metadata cannot be read is left out with a warning: it must not hide the others.
    """
    found: list[Entry] = []
    for name in _distributions_with(group):
        try:
            # By name, so that of two copies on `sys.path` the one that Python would import is read.
            dist = metadata.distribution(name)
            source = Source(dist.metadata["Name"], dist.version)
            requires = tuple(dist.requires or ())
            found += [
                Entry(group, point.name.lower(), point.value, source, requires)
                for point in dist.entry_points.select(group=group)
            ]
        except Exception as error:
            _warn_unreadable(name, error)
    return tuple(sorted(found, key=lambda entry: (entry.name, str(entry.source))))


def _distributions_with(group: str) -> list[str]:
    """Names of distributions whose entry points mention `group`; reads one small file of each."""
    names: set[str] = set()
    for dist in metadata.distributions():
        try:
            if group in (dist.read_text("entry_points.txt") or ""):
                names.add(canonicalize_name(dist.metadata["Name"]))
        except Exception as error:
            _warn_unreadable(str(getattr(dist, "_path", dist)), error)
    return sorted(names)


def _warn_unreadable(where: str, error: Exception) -> None:
    warnings.warn(
        f"The metadata of {where} cannot be read, so its plugins are not available: {error!r}. "
        "Install that distribution again.",
        RuntimeWarning,
        stacklevel=2,
    )


def refresh() -> None:
    """Forget what was found, so that plugins installed since then are seen."""
    importlib.invalidate_caches()
    entries.cache_clear()
    core_version.cache_clear()


def disabled_names() -> frozenset[str]:
    """Names in `PEFT_CORE_DISABLE_PLUGINS`: of methods, extensions or distributions."""
    parts = (part.strip() for part in os.environ.get(DISABLE_VARIABLE, "").split(","))
    return frozenset(part.lower() for part in parts if part)


def is_named(entry: Entry, name: str) -> bool:
    """Whether `name`, as in `PEFT_CORE_DISABLE_PLUGINS`, means this plugin or its distribution."""
    return name == entry.name or canonicalize_name(name) == canonicalize_name(entry.source.distribution or "")


def is_disabled(entry: Entry) -> bool:
    return any(is_named(entry, name) for name in disabled_names())


def resolve(name: str, *, registered: Iterable[str] = (), wrote_by: str | None = None, rescan: bool = True) -> Entry:
    """Return the one enabled entry point of method `name` (lower case), its metadata checked.

    Args:
        registered: methods registered at run time, for the list of what there is.
        wrote_by: the distribution that wrote the checkpoint in which `name` was found.
        rescan: look again at what is installed before saying that the method is not.

    Raises:
        MethodNotFoundError, MethodDisabledError, MethodClashError, MethodVersionError, MethodImportError:
            the last where the entry point does not name a module.
    """
    found = [entry for entry in entries(METHODS) if entry.name == name]
    if not found and rescan:
        refresh()
        return resolve(name, registered=registered, wrote_by=wrote_by, rescan=False)
    if not found:
        raise MethodNotFoundError(_not_found(name, registered, wrote_by))
    enabled = [entry for entry in found if not is_disabled(entry)]
    if not enabled:
        raise MethodDisabledError(
            f"The {found[0].label} is disabled.\n"
            f"It is named in the environment variable {DISABLE_VARIABLE}={os.environ[DISABLE_VARIABLE]!r}.\n"
            "Take it off that list and start Python again to use it."
        )
    if len(enabled) > 1:
        providers = " and ".join(f"{entry.source} ({entry.value})" for entry in enabled)
        raise MethodClashError(
            f"The method {name!r} is provided more than once: by {providers}.\n"
            "Which one is meant cannot be decided from the name.\n"
            f"Uninstall one, or name its distribution in {DISABLE_VARIABLE}, as in "
            f"{DISABLE_VARIABLE}={enabled[-1].source.distribution}."
        )
    check_metadata(enabled[0])
    return enabled[0]


def check_metadata(entry: Entry) -> None:
    """Check, before any import, that the entry point names a module and that the plugin accepts this core.

    Raises:
        MethodImportError, MethodVersionError.
    """
    if not _VALUE.match(entry.value):
        raise MethodImportError(
            f"The {entry.label} cannot be imported: its entry point is not of the form package.module.\n"
            f"Correct it in the packaging of {entry.source.distribution}."
        )
    version = core_version()
    if version is None:
        return
    for text in entry.requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            if re.match(r"peft[-_.]+core\b", text, re.IGNORECASE):
                raise MethodVersionError(
                    f"The {entry.label} declares a range of {CORE} that cannot be read: {shown(text)}.\n"
                    f"Correct it in the packaging of {entry.source.distribution}."
                ) from error
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) != CORE or not applies:
            continue
        # Pre-releases count: a development version of the core is judged by its number like any other.
        if not requirement.specifier.contains(version, prereleases=True):
            raise MethodVersionError(
                f"The {entry.label} needs {CORE}{requirement.specifier}, and {CORE} {version} is installed.\n"
                "It was not imported, since it was written against another version of the hooks.\n"
                f"Install versions that fit together: pip install -U {CORE} {entry.source.distribution}"
            )


@functools.cache
def known_methods() -> Mapping[str, str]:
    """Distributions of methods that are known to exist, `{method: distribution}`: a generated data file."""
    text = (resources.files(__package__) / "known_methods.json").read_text(encoding="utf-8")
    known: dict[str, str] = json.loads(text)
    return known


def _not_found(name: str, registered: Iterable[str], wrote_by: str | None) -> str:
    here = sorted({entry.name for entry in entries(METHODS)} | set(registered))
    known = known_methods()
    # Near an underscore form: an entry point's name may hold a dash, a method's name does not.
    hint = did_you_mean(name.replace("-", "_"), {*here, *known} - {name})
    lines = [f"No method {shown(name)} is installed.{hint}", f"Installed: {', '.join(here) or 'none'}."]
    lines += [
        f"To get {method!r}: pip install {distribution}"
        for method, distribution in known.items()
        if method == name or (f" {method!r}?" in hint and method not in here)
    ]
    if wrote_by is not None:
        # A file's word: shown as data, never as a command to paste.
        lines.append(
            f"The checkpoint says that it was written with the distribution {shown(wrote_by)}. "
            "A plugin is code that runs with your rights: install it only if you trust it."
        )
    elif name not in known:
        lines.append("Install the distribution that provides it, or pass its module to register_method().")
    return "\n".join(lines)

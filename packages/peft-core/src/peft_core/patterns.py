"""Names and patterns of module paths, compiled once and matched quickly.

Two forms select modules: a string is a regular expression for the whole path; in a tuple each entry is a
name, equal to the path or to its end at a dot, or a glob (an entry with `*`, `?` or `[`) for the same: `*`
stays within one component, `**`, as a whole component, crosses dots.

Patterns of the user are run by `re`. Patterns from files (`trusted=False`) could be made to run for years or
to eat memory, so they are limited in length and repeats, and matched under one time limit.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import regex  # type: ignore[import-untyped]

from .errors import ConfigError

# Limits on patterns from files. The longest ones in use, of Unsloth, have some 600 characters.
MAX_PATTERN = 4096
MAX_PATTERNS = 1000
# Counted repeats are unrolled when `regex` compiles, so nested ones multiply.
MAX_REPEATS = 1000
# Seconds for all matches of one matcher. Ordinary patterns need some 10 ms for 10,000 modules.
TIME_LIMIT = 2.0

_GLOB = re.compile(r"[*?\[]")
_PLAIN = re.compile(r"[\w\-]+(\.[\w\-]+)*", re.ASCII)

T = TypeVar("T")
D = TypeVar("D")


class NameMatcher:
    """Matches paths against the entries of one config field, and remembers which entries were of use."""

    def __init__(self, entries: str | Sequence[str], *, what: str, trusted: bool) -> None:
        """`what` names the field in errors. Raises `ConfigError` for a pattern that cannot be used."""
        self.entries = (entries,) if isinstance(entries, str) else tuple(entries)
        self._used: set[str] = set()
        self._names: set[str] = set()
        self._patterns: list[tuple[str, _Pattern]] = []
        compiler = _Compiler(what, trusted)
        if isinstance(entries, str):
            self._patterns.append((entries, compiler.compile(entries, entries)))
        else:
            for entry in entries:
                if _GLOB.search(entry):
                    self._patterns.append((entry, compiler.compile(_glob(entry), entry)))
                else:
                    self._names.add(entry)
        # Most paths are turned away by their last component, without looking at their other ends.
        self._last = {name.rpartition(".")[2] for name in self._names}

    def matches(self, *paths: str) -> bool:
        """Whether any entry matches any of the paths of one module. Each is looked at, for `unmatched`."""
        found = False
        for path in paths:
            found |= self._matches(path)
        return found

    def _matches(self, path: str) -> bool:
        found = False
        if path.rpartition(".")[2] in self._last:
            for end in ends(path):
                if end in self._names:
                    self._used.add(end)
                    found = True
        for entry, pattern in self._patterns:
            if (not found or entry not in self._used) and pattern.fullmatch(path):
                self._used.add(entry)
                found = True
        return found

    def unmatched(self) -> list[str]:
        """The entries that have matched nothing so far, in their order."""
        return [entry for entry in self.entries if entry not in self._used]


class PatternMap(Generic[T]):
    """A mapping from patterns to values, asked by path: the first key to match `(.*\\.)?(key)$` counts."""

    def __init__(self, patterns: Mapping[str, T], *, what: str, trusted: bool) -> None:
        """`what` names the field in errors. Raises `ConfigError` for a key that cannot be used."""
        self._keys = list(patterns)
        self._values = list(patterns.values())
        self._used: set[int] = set()
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._patterns: list[tuple[int, _Pattern]] = []
        compiler = _Compiler(what, trusted)
        for index, key in enumerate(self._keys):
            # Plain names, also in the anchored and escaped form in which some writers put whole paths.
            name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if _PLAIN.fullmatch(name):
                (self._whole if key.startswith("^") else self._ends).setdefault(name, index)
            else:
                self._patterns.append((index, compiler.compile(rf"(?:.*\.)?(?:{key})", key)))

    def get(self, path: str, default: D) -> T | D:
        """The value of the first matching key, or `default`."""
        first = self._whole.get(path, len(self._keys))
        if self._ends:
            first = min([first, *(self._ends[end] for end in ends(path) if end in self._ends)])
        for index, pattern in self._patterns:
            if index > first:
                break
            if pattern.fullmatch(path):
                first = index
                break
        if first == len(self._keys):
            return default
        self._used.add(first)
        return self._values[first]

    def unmatched(self) -> list[str]:
        """The keys that have decided nothing so far, in their order."""
        return [key for index, key in enumerate(self._keys) if index not in self._used]


def ends(path: str) -> Iterator[str]:
    """The path and each of its ends at a dot: a.b.c, b.c, c."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


class _Pattern(Protocol):
    def fullmatch(self, string: str) -> object | None: ...


class _Compiler:
    """Compiles the patterns of one field, all under the same limits."""

    def __init__(self, what: str, trusted: bool) -> None:
        self._what = what
        self._trusted = trusted
        self._budget = _Budget(TIME_LIMIT)
        self._count = 0

    def compile(self, pattern: str, entry: str) -> _Pattern:
        """Compile `pattern`, which the field spells `entry`. Raises `ConfigError`."""
        self._count += 1
        shown = repr(entry if len(entry) <= 100 else entry[:100] + "...")
        where = f"{self._what}: the pattern {shown}"
        if not self._trusted:
            if len(pattern) > MAX_PATTERN:
                raise ConfigError(f"{where} has more than {MAX_PATTERN} characters, too many for one from a file")
            if self._count > MAX_PATTERNS:
                raise ConfigError(f"{self._what}: more than {MAX_PATTERNS} patterns, too many for a file")
            _check_repeats(pattern, where)
        try:
            # Also for files: what `re` refuses (recursion, fuzzy matching) is what makes `regex` dangerous.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = re.compile(pattern)
                if self._trusted:
                    return compiled
                return _Limited(regex.compile(pattern), self._budget, where)
        except (re.error, regex.error, OverflowError, RecursionError, RuntimeError) as error:
            raise ConfigError(f"{where} is not a valid regular expression: {error}") from error


class _Budget:
    """Seconds left for all matches of one matcher."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds


class _Limited:
    """A compiled pattern from a file. `fullmatch` raises `ConfigError` when the time is used up."""

    def __init__(self, pattern: regex.Pattern[str], budget: _Budget, where: str) -> None:
        self._pattern = pattern
        self._budget = budget
        self._where = where

    def fullmatch(self, string: str) -> object | None:
        start = time.perf_counter()
        try:
            if self._budget.left <= 0:
                raise TimeoutError
            found: object | None = self._pattern.fullmatch(string, timeout=self._budget.left)
            return found
        except (TimeoutError, MemoryError):
            raise ConfigError(
                f"{self._where} takes too long to match; a pattern from a file has {TIME_LIMIT:g} s for the "
                "whole model. Replace it in the file by a list of names."
            ) from None
        finally:
            self._budget.left -= time.perf_counter() - start


def _check_repeats(pattern: str, where: str) -> None:
    """Refuse counted repeats that unroll to too much, and braces that mean more to `regex` than to `re`."""
    total = 1
    plain = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    for brace in re.finditer(r"\{([^}]*)\}?", plain):
        counts = re.fullmatch(r"(\d{0,5})(?:,(\d{0,5}))?", brace[1], re.ASCII)
        if counts is None:
            raise ConfigError(f"{where} has a brace that is not a counted repeat of up to {MAX_REPEATS}")
        total *= max(int(counts[1] or 1), int(counts[2] or 1), 1)
        if total > MAX_REPEATS:
            raise ConfigError(f"{where} repeats more than {MAX_REPEATS} times, too often for one from a file")


def _glob(entry: str) -> str:
    """Translate a glob for a path or its end at a dot into a regular expression."""
    parts = [r"(?:.*\.)?"]
    at = 0
    while at < len(entry):
        char = entry[at]
        if entry.startswith("**.", at) and (at == 0 or entry[at - 1] == "."):
            parts.append(r"(?:.*\.)?")  # Any number of components, none included.
            at += 3
        elif entry[at:] == "**" and (at == 0 or entry[at - 1] == "."):
            parts.append(".*")
            at += 2
        elif char == "*":
            parts.append("[^.]*")
            at += 1
        elif char == "?":
            parts.append("[^.]")
            at += 1
        elif char == "[" and (close := entry.find("]", at + 2 + entry.startswith("!", at + 1))) > 0:
            body = re.sub(r"([\\\[\]^&~|])", r"\\\1", entry[at + 1 : close].removeprefix("!"))
            parts.append(rf"(?!\.)[{'^' if entry[at + 1] == '!' else ''}{body}]")
            at = close + 1
        else:
            parts.append(re.escape(char))
            at += 1
    return "".join(parts)

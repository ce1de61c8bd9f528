"""For error messages: values shown short, and near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# difflib is quadratic per pair: a model with 100,000 module names must not turn a typo into a long wait.
_MAX_OPTIONS = 2000


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `options`, or "" where nothing is near."""
    unique = sorted({str(option) for option in options})[:_MAX_OPTIONS]
    near = difflib.get_close_matches(name[:200], unique, n=1, cutoff=0.6)
    if not near:
        folded = {option.lower(): option for option in unique}
        near = [folded[key] for key in difflib.get_close_matches(name[:200].lower(), folded, n=1, cutoff=0.6)]
    return f" Did you mean {near[0]!r}?" if near else ""


def shown(value: object, limit: int = 80) -> str:
    """A value for an error message: never long, whatever a file holds."""
    if isinstance(value, (str, bytes)):
        value = value[: limit + 1]
    elif isinstance(value, (list, tuple, dict)) and len(value) > limit:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except Exception:  # A broken `__repr__`, or an integer of too many digits, must not hide the error.
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."

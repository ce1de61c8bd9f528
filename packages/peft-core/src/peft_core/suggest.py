"""Near misses for error messages."""

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

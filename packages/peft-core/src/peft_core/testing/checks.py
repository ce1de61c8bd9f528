"""Saying which promise was broken, what was seen, and where to look."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

Test = TypeVar("Test", bound=Callable[..., Any])

# Packages whose lines are not the plugin's: an error is blamed on the last line that is outside of them.
_LIBRARIES = frozenset(
    {
        "peft_core", "torch", "pluggy", "pydantic", "pydantic_core", "safetensors", "transformers", "accelerate",
        "numpy", "pytest", "_pytest", "wrapt", "regex",
        *sys.stdlib_module_names,
    }
)  # fmt: skip
_LONGEST = 3000
_NOWHERE = "the hook that the message names; no line of the plugin itself raised"


class BrokenPromise(AssertionError):
    """A promise of the contract that a method does not keep. The message has three parts.

    `place` is the plugin's line that raised, where one did; `look` says where to look in general.
    """

    def __init__(self, promise: str, seen: str, look: str, place: str = "") -> None:
        where = "; ".join(part for part in (place, look) if part)
        parts = {"promise: ": promise or "an adapted model runs", "seen:    ": seen, "look at: ": where or _NOWHERE}
        text = "\n".join(f"  {name}{part}".replace("\n", "\n           ") for name, part in parts.items())
        super().__init__(f"\n{text}")
        self.vague, self.seen, self.look, self.place = not promise, seen, look, place


def check(kept: object, promise: str, seen: str, look: str) -> None:
    """Raise `BrokenPromise` where a promise is not kept."""
    __tracebackhide__ = True
    if not kept:
        raise BrokenPromise(promise, seen, look)


@contextmanager
def promised(promise: str, look: str = "") -> Iterator[None]:
    """Turn an exception inside the block into a broken promise; the exception stays as the cause.

    `look` says where to look in general; the line of the plugin that raised is put in front of it. An empty promise
    is filled in by the next block further out.
    """
    __tracebackhide__ = True
    try:
        yield
    except BrokenPromise as error:
        if error.vague:
            raise BrokenPromise(promise, error.seen, look or error.look, error.place) from error.__cause__
        raise
    except Exception as error:
        raise BrokenPromise(promise, _described(error), look, _place(error)) from error


@contextmanager
def refused(kind: type[Exception], promise: str, look: str) -> Iterator[None]:
    """Raise `BrokenPromise` unless the block raises `kind`."""
    __tracebackhide__ = True
    try:
        yield
    except BrokenPromise:
        raise
    except kind:
        return
    except Exception as error:
        raise BrokenPromise(promise, _described(error), look, _place(error)) from error
    raise BrokenPromise(promise, f"no {kind.__name__}", look)


def explained(test: Test) -> Test:
    """Whatever a test of the suite raises is a broken promise: that of its docstring, where it says no other."""
    promise = " ".join((inspect.getdoc(test) or test.__name__).partition("\n\n")[0].split())

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with promised(promise):
            return test(*args, **kwargs)

    return run  # type: ignore[return-value]


# -- exceptions --------------------------------------------------------------------------------------------------


def _described(error: BaseException) -> str:
    notes = getattr(error, "__notes__", ())  # Python 3.11: which hook was called
    text = "\n".join([f"{type(error).__name__}: {error}", *notes])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _place(error: BaseException) -> str:
    """The plugin's line that raised the error, or what the error came from."""
    cause: BaseException | None = error
    while cause is not None:
        if place := _plugins_line(cause.__traceback__):
            return place
        cause = cause.__cause__
    return ""


def _plugins_line(traceback: TracebackType | None) -> str | None:
    found = None
    while traceback is not None:
        frame = traceback.tb_frame
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _LIBRARIES:
            name = _qualified(frame.f_code, frame.f_locals)
            found = f"{name} ({frame.f_code.co_filename}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return found


def _qualified(code: CodeType, local: Mapping[str, Any]) -> str:
    if hasattr(code, "co_qualname"):  # Python 3.11
        return str(code.co_qualname)
    return f"{type(local['self']).__name__}.{code.co_name}" if "self" in local else code.co_name


# -- outputs -----------------------------------------------------------------------------------------------------


def flat(value: Any) -> list[Tensor]:
    """The tensors in an output, whatever it is made of."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in flat(item)]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [tensor for item in value for tensor in flat(item)]
    return []


def kinds(value: Any) -> Any:
    """What an output is made of, for a message: shapes and dtypes of its tensors, or the output's type."""
    return [(tuple(t.shape), t.dtype) for t in flat(value)] or type(value).__name__


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit (dtype and shape included)."""
    ones, others = flat(one), flat(other)
    return len(ones) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ones, others, strict=True)
    )


def gap(one: Any, other: Any) -> float:
    """Largest difference between two outputs, relative to the largest value of the second; infinite where
    they do not even have the same shapes, or one is not finite."""
    ones, others = flat(one), flat(other)
    if [a.shape for a in ones] != [b.shape for b in others]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ones, others, strict=True):
        if not b.numel():
            continue
        difference = (a.detach().double() - b.detach().double()).abs().max().item()
        largest = b.detach().double().abs().max().item()
        # `not <=` rather than `>`: NaN counts as a difference.
        relative = difference / largest if largest > 0 else difference
        if not relative <= worst:
            worst = relative if relative == relative else float("inf")
    return worst

"""Saying which promise was broken, what was seen, and where to look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def check(kept: object, promise: str, seen: str, look: str) -> None:
    """Fail with a message in three parts where a promise is not kept."""
    __tracebackhide__ = True
    if not kept:
        raise AssertionError(f"\n  promise: {promise}\n  seen:    {seen}\n  look at: {look}")


@contextmanager
def promised(promise: str, look: str) -> Iterator[None]:
    """Turn an exception inside the block into a broken promise; the exception stays as the cause."""
    __tracebackhide__ = True
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
        raise AssertionError(f"\n  promise: {promise}\n  seen:    {seen}\n  look at: {look}") from error


@contextmanager
def refused(kind: type[Exception], promise: str, look: str) -> Iterator[None]:
    """Fail unless the block raises `kind`."""
    __tracebackhide__ = True
    try:
        yield
    except kind:
        return
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
        raise AssertionError(f"\n  promise: {promise}\n  seen:    {seen}\n  look at: {look}") from error
    check(False, promise, f"no {kind.__name__}", look)


def flat(value: Any) -> list[Tensor]:
    """The tensors in an output, whatever it is made of."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in flat(item)]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [tensor for item in value for tensor in flat(item)]
    return []


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

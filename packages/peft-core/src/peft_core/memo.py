"""What adapters made of their tensors, kept from call to call until one of them is another or was written to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Entry:
    key: Hashable
    held: tuple[Tensor, ...]
    """The tensors' memory: while it is held, nothing else can come to lie where it was."""
    state: list[tuple[int, int]]
    value: Any


class Memo:
    """The last value of each kind made at one place. Copies begin empty."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def of(self, kind: str, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` gives for these tensors; not made again while key and tensors are the same.

        Nothing is kept where a gradient may be wanted, inside a compiled graph, and of inference tensors, which count
        no versions. As everywhere in torch, writes through `.data` are not seen; `clear` is for what does that.
        """
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return make()
        try:
            state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError:  # inference tensors
            return make()
        key = key, torch.is_inference_mode_enabled()
        entry = self._entries.get(kind)
        if entry is None or entry.key != key or entry.state != state:
            entry = _Entry(key, tuple(tensor.detach() for tensor in tensors), state, make())
            self._entries[kind] = entry
        value: T = entry.value
        return value

    def clear(self) -> None:
        """Forget all of it."""
        self._entries = {}

    def __deepcopy__(self, memo: object) -> Memo:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()

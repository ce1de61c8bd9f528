"""What layers read, batch by batch, gathered once where several layers read the same tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from peft_core.errors import ConfigError
from peft_core.layers import BaseLayer

T = TypeVar("T")


class PerInput(Generic[T]):
    """One gatherer for each input: queries, keys and values of a block usually have one between them."""

    def __init__(self, make: Callable[[tuple[str, ...]], T]) -> None:
        """`make` is given the paths of the layers that read the input."""
        self._make = make
        self._groups: list[tuple[str, ...]] | None = None
        self._found: dict[str, T] = {}

    def groups(self, seen: Mapping[str, Tensor]) -> list[tuple[T, Tensor]]:
        """The gatherers that one batch concerns, each with its input. `seen` is by path."""
        by_tensor: dict[Any, list[str]] = {}
        for path, tensor in seen.items():
            # All of them are alive, so that a place in memory is that of one tensor.
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            by_tensor.setdefault(key, []).append(path)
        now = [tuple(paths) for paths in by_tensor.values()]
        if self._groups is None:
            self._groups = now
            for paths in now:
                self._found.update(dict.fromkeys(paths, self._make(paths)))
        elif self._groups != now:
            # The layers do not always read the same: from now on each has its own.
            now = self._groups = [(path,) for path in seen]
            self._found = {path: copy.deepcopy(one) for path, one in self._found.items()}
            for path in seen:
                if path not in self._found:
                    self._found[path] = self._make((path,))
        return [(self._found[paths[0]], seen[paths[0]]) for paths in now]

    def of(self, layer: BaseLayer) -> T:
        """What was gathered for a layer. Raises `ConfigError` where no batch reached it."""
        try:
            return self._found[layer.path]
        except KeyError:
            raise ConfigError(
                f"{layer.path}: no calibration batch reached this layer; give batches that use it, or exclude it"
            ) from None

    def all(self) -> list[T]:
        """All gatherers, each once."""
        return list({id(one): one for one in self._found.values()}.values())


def rows(x: Tensor) -> Tensor:
    """An input (..., in) as rows (n, in), in float32."""
    return x.detach().reshape(-1, x.shape[-1]).float()

"""Facts of one call of the model, for the adapters inside that ask for them.

A call is described only where an adapter of the model wants it (`Adapter.uses_call`, or request arguments of its
config), so that all others pay nothing. It belongs to the request: it outlives the forward, and the recompute of
activation checkpointing finds it again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .counted_cache import CACHE_NAMES
from .errors import RequestError


class Call:
    """One call of the model: what it was given, how far its generation is, and a place for notes.

    Attributes:
        arguments: the request arguments that were given, by name.
        inputs: the arguments of the model's forward, by name.
        past_length: positions per row that the cache held when the call began.
        scratch: lives for this call; sites of one adapter leave each other tensors here, under a key of their own.
        carried: lives as long as the outermost call, for instance a whole `generate`.
        losses: terms that adapters added with `add_loss`, by name.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        arguments: Mapping[str, Any],
        *,
        training: bool = False,
        generating: bool = False,
        outer: Call | None = None,
    ) -> None:
        self.inputs = inputs
        self.arguments: dict[str, Any] = {**outer.arguments, **arguments} if outer else dict(arguments)
        self.training = training
        self.generating: bool = generating or (outer is not None and outer.generating)
        self.carried: dict[Any, Any] = outer.carried if outer else {}
        self.scratch: dict[Any, Any] = {}
        self.losses: dict[str, Tensor] = {}
        self.past_length = _length(next((inputs[n] for n in CACHE_NAMES if inputs.get(n) is not None), None))
        self._part: tuple[Tensor, int] | None = None

    @property
    def phase(self) -> str:
        """ "train", "prefill" (the first step of a generation), "decode" (a later one), or "score".

        A model in training mode that generates does not train.
        """
        if self.training and not self.generating:
            return "train"
        if self.past_length:
            return "decode"
        return "prefill" if self.generating else "score"

    def rows(self, name: str, size: int) -> Tensor:
        """A request argument, or an input of the model, with one entry for each of the `size` rows that a layer sees.

        What was given for n rows is repeated where a layer sees several rows for each, as under beam search.

        Raises `RequestError` where the argument was not given, or does not fit the rows.
        """
        given = self.arguments.get(name)
        given = self.inputs.get(name) if given is None else given
        if given is None:
            raise RequestError(f"this call needs {name}: pass {name}=..., one entry for each row of the batch")
        value = torch.as_tensor(given)
        whole = size if self._part is None else self._part[1]
        value = value.reshape(1) if value.dim() == 0 else value
        times, rest = divmod(whole, len(value))
        if rest or not times:
            raise RequestError(
                f"{name} has {len(value)} entries, but a layer received {whole} rows; give one for each row of the "
                "batch, or a single one for all"
            )
        value = value.repeat_interleave(times, 0)
        return value if self._part is None else value.to(self._part[0].device).index_select(0, self._part[0])

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a scalar that depends on activations to the loss of this call; terms of one name add up.

        Raises `RequestError` where its gradient would be lost: inside reentrant activation checkpointing.
        """
        if self.training and not torch.is_grad_enabled() and self._expects_gradients:
            raise RequestError(
                f"the loss term {name!r} is computed where no gradients are recorded, so it would not train; use "
                "activation checkpointing with use_reentrant=False"
            )
        check_term(name, value)
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    _expects_gradients = False

    def expect_gradients(self) -> None:
        """Note that the call began with gradients on."""
        self._expects_gradients = torch.is_grad_enabled()

    def of_rows(self, rows: Tensor, size: int) -> Call:
        """This call as it looks to some of a batch's `size` rows; notes and losses stay shared."""
        part = copy.copy(self)
        part._part = (rows, size)
        return part

    def apart(self) -> Call:
        """This call for one more pass through the model, whose notes and losses do not mix with the first one's."""
        other = copy.copy(self)
        other.scratch, other.losses, other._expects_gradients = {}, {}, False
        return other


def check_term(name: str, value: Tensor) -> None:
    """Raise `RequestError` for a term that is no scalar: the loss would be none either."""
    if value.dim() or not value.is_floating_point():
        raise RequestError(
            f"the loss term {name!r} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; a term is a "
            "scalar: sum it, or take its mean"
        )


def _length(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:
        return int(cache[0][0].shape[-2])  # tuples of keys and values, as older models have them
    except (TypeError, IndexError, KeyError, AttributeError):
        return 0


@functools.cache
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's own parameters, without `self`."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def take_arguments(own: tuple[str, ...], kwargs: dict[str, Any], declared: tuple[str, ...]) -> dict[str, Any]:
    """The request arguments among a call's keywords, taken out unless they are among those of the base's forward."""
    return {name: kwargs[name] if name in own else kwargs.pop(name) for name in declared if name in kwargs}


def inputs_of(own: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, `own` being the names of the forward's parameters."""
    return {**dict(zip(own, args, strict=False)), **kwargs}

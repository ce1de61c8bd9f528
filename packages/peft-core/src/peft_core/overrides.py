"""Methods of transformers' models that adapted models have in another form, where their class has them at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .calls import Call, take_arguments
from .counted_cache import CACHE_NAMES, CountedCache, counted, own_part
from .errors import RequestError
from .model import PeftModel, rows_of
from .records import PeftState
from .subclass import forward_names, remember_checkpoints


def _generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The model's `generate`. `adapter_names` chooses an adapter for each row of the batch."""
    routing = self._peft.routing
    call = None
    if routing.describes_calls:
        own = forward_names(type(self))
        arguments = take_arguments(own, kwargs, routing.arguments)
        outer = routing.outer()
        inputs = {getattr(self, "main_input_name", "input_ids"): args[0] if args else kwargs.get("inputs"), **kwargs}
        inputs = {name: inputs[name] for name in own if inputs.get(name) is not None}  # an encoder is called with these
        call = Call(inputs, arguments, generating=True, outer=outer.call if outer else None)
    with routing.use(routing.request(rows_of(self._peft, adapter_names), call)):
        return super(PeftModel, self).generate(*args, **kwargs)


def forward_of_request(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward that has request arguments in its signature; called by that name, it is the model's call."""
    own = forward_names(type(self))
    if any(name in kwargs and name not in own for name in self._peft.routing.arguments):
        return self(*args, **kwargs)
    return super(PeftModel, self).forward(*args, **kwargs)


def _get_compiled_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What `generate` runs step by step where it compiles: a graph of the whole call is the standing choice's."""
    routing = self._peft.routing
    if routing.current() != routing.default:
        return self.__call__
    return super(PeftModel, self).get_compiled_call(*args, **kwargs)


def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
    super(PeftModel, self)._set_gradient_checkpointing(*args, **kwargs)
    remember_checkpoints(self, self._peft.routing)


def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A static cache gets room for the positions that active adapters add. Raises `RequestError` for a given one."""
    prepare = super(PeftModel, self)._prepare_cache_for_generation
    extra = extra_positions(self._peft)
    if not extra:
        return prepare(*args, **kwargs)
    given = inspect.signature(prepare).bind(*args, **kwargs).arguments
    given["max_cache_length"] += extra
    result = prepare(**given)
    cache = next((c for name in CACHE_NAMES if (c := given["model_kwargs"].get(name)) is not None), None)
    own: Any = None if cache is None else counted(cache)
    if getattr(own, "is_compileable", False) and not any(own.is_sliding):
        room = own.get_max_length() + own.hidden
        if room < given["max_cache_length"]:
            raise RequestError(
                f"generate: the static cache has room for {room} positions; this generation and the {extra} that "
                f"active adapters add need {given['max_cache_length']}. Make it longer, or let generate make it."
            )
    return result


def _prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Where a cache holds more positions than `generate` knows, the mask stays one of two dimensions.

    The backbone makes the larger one of it, which knows of the added positions and of sliding windows. It is padded to
    the length of a static cache, so that a compiled step sees one shape.
    """
    inputs = super(PeftModel, self).prepare_inputs_for_generation(*args, **kwargs)
    cache = own_part(next((c for name in CACHE_NAMES if (c := inputs.get(name)) is not None), None))
    name = "decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask"
    made = inputs.get(name)
    if isinstance(cache, CountedCache) and made is not None and getattr(made, "ndim", 0) != 2:
        mask = kwargs.get(name)
        if mask is not None and cache.filled:
            mask = nn.functional.pad(mask, (0, max(cache.get_max_length() - mask.shape[1], 0)))
        inputs[name] = None if mask is None else mask.to(self.device)
    return inputs


def extra_positions(state: PeftState) -> int:
    """How many positions the adapters of the running call put before a sequence, at the site with the most."""
    request = state.routing.current()
    chosen = [request.active] if request.rows is None else [(name,) for name in dict.fromkeys(request.rows)]
    found = [
        sum(getattr(adapter, "extra_positions", 0) for adapter in site.chain(active))
        for site in list(state.sites.values())  # another thread may add one
        for active in chosen
    ]
    return max(found, default=0)


OVERRIDES: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "get_compiled_call": _get_compiled_call,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "_set_gradient_checkpointing": _set_gradient_checkpointing,
}

"""Methods of transformers' models that adapted models have in another form, where their class has them at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .model import PeftModel, rows_of
from .subclass import remember_checkpoints


def _generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The model's `generate`. `adapter_names` chooses an adapter for each row of the batch."""
    routing = self._peft.routing
    with routing.use(routing.request(rows_of(self._peft, adapter_names))):
        return super(PeftModel, self).generate(*args, **kwargs)


def _get_compiled_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What `generate` runs step by step where it compiles: a graph of the whole call is the standing choice's."""
    routing = self._peft.routing
    if routing.current() != routing.default:
        return self.__call__
    return super(PeftModel, self).get_compiled_call(*args, **kwargs)


def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
    super(PeftModel, self)._set_gradient_checkpointing(*args, **kwargs)
    remember_checkpoints(self, self._peft.routing)


OVERRIDES: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "get_compiled_call": _get_compiled_call,
    "_set_gradient_checkpointing": _set_gradient_checkpointing,
}

"""What adapters add to the loss: the terms of one call, and putting them into the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .calls import check_term
from .errors import add_note
from .records import PeftState
from .routing import Request


def terms_of(state: PeftState, request: Request) -> dict[str, Tensor]:
    """The terms of the adapters that act in a call, summed over sites by name."""
    found: dict[str, Tensor] = {}
    for name in request.names():
        record = state.adapters.get(name)  # another thread may have deleted it
        for adapter in record.with_losses if record else ():
            for term, value in _losses_of(adapter, name).items():
                check_term(term, value)
                found[term] = found[term] + value if term in found else value
    for term, value in (request.call.losses if request.call else {}).items():
        found[term] = found[term] + value if term in found else value
    return found


def _losses_of(adapter: Adapter, name: str) -> Mapping[str, Tensor]:
    try:
        return adapter.losses()
    except Exception as error:
        where = adapter.layer.path or "the model itself"
        add_note(error, f"Raised in losses() of adapter {name!r} ({type(adapter).__name__}) at {where}.")
        raise


def with_terms(outputs: Any, terms: Mapping[str, Tensor], labelled: bool) -> Any:
    """The output with the terms in its loss; as it is, where it has none.

    A loss is the entry or attribute `loss`, or the first entry of a tuple that answers to labels.
    """
    extra = sum(terms.values())
    if isinstance(outputs, dict):
        if isinstance(outputs.get("loss"), Tensor):
            outputs["loss"] = outputs["loss"] + extra
    elif isinstance(outputs, tuple) and not hasattr(outputs, "_fields"):
        if labelled and outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:
            return (outputs[0] + extra, *outputs[1:])
    elif isinstance(getattr(outputs, "loss", None), Tensor):
        outputs.loss = outputs.loss + extra
    return outputs

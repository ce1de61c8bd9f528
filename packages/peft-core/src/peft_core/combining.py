"""New adapters made of others: which adapters, by whose method, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import hook_results
from .adapter import Adapter
from .config import AdapterConfig
from .errors import CombineError
from .lifecycle import checked_draft, require_free, require_unmerged
from .methods import load_method
from .planning import Draft
from .records import state_of


@dataclass(frozen=True)
class CombineSource:
    """One of the adapters to combine: its parts by site (`path`, or `path:part`), its shared module, its weight."""

    name: str
    config: AdapterConfig
    adapters: Mapping[str, Adapter]
    shared: nn.Module
    weight: float


def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str,
    config: AdapterConfig | None,
    options: Mapping[str, Any],
) -> tuple[Draft, Mapping[str, Any]]:
    """See `PeftModel.add_weighted_adapter`: the new adapter, built and filled, not yet on the model; and the report."""
    state = state_of(model)
    assert state is not None
    require_unmerged(state, "combining adapters")
    if not names or len(names) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise CombineError(
            f"add_weighted_adapter needs adapters and as many finite weights, not {list(names)} and {list(weights)}"
        )
    require_free(state, name)
    records = [state.record(other) for other in names]
    sources = [
        CombineSource(r.name, r.config, r.placed, r.shared, float(weight))
        for r, weight in zip(records, weights, strict=True)
    ]
    method = records[0].method if config is None else load_method(config.peft_type)
    with torch.no_grad():
        found = hook_results.call(
            method, "peft_combine", model=model, name=name, sources=sources, how=how, config=config, options=options
        )
    if found is None:
        by = f" by {how!r}" if how else ""
        raise CombineError(
            f"adapters {list(names)} cannot be combined{by}: the {method.label} does not know how. Activate "
            "them together (set_adapter), merge them one after the other, or give the config of a method that combines"
        )
    return checked_draft(model, name, found.config, True, None, start=found), found.report

"""The part of `PeftModel` that folds adapters into the base weights, and that leaves a plain model behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from .errors import MergeError, RequestError
from .lifecycle import leave, note_ties, require_unmerged
from .merging import merge, names_to_merge, unmerge
from .records import PeftState
from .suggest import did_you_mean
from .transaction import Undo


class Mergeable:
    """Merging, unmerging and unloading."""

    _peft: PeftState

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        *,
        progressbar: bool = False,
        **request_arguments: Any,
    ) -> None:
        """Fold adapters (default: the active ones) into the base weights; `unmerge_adapter` is exact.

        Non-finite results are always refused, so `safe_merge` may stay as it is. `request_arguments` are for methods
        whose weights depend on one (a task, say): the merged model then computes that case alone.

        Raises `MergeError`, with every weight as it was, and `RequestError` for an argument no adapter declares.
        """
        state = self._peft
        require_unmerged(state, "merge_adapter")
        _check_arguments(state, request_arguments)
        names = names_to_merge(state, adapter_names)
        with Undo() as undo:
            undo.keep_state(state)
            state.snapshots = merge(state, names, undo, progressbar=progressbar, arguments=request_arguments)
            state.routing.merged_for = request_arguments
            state.resting, state.active = state.active, names  # for as long as it lasts; flags stay as they are
            state.publish()
            state.routing.merged = names

    def unmerge_adapter(self) -> None:
        """Put the base weights back bit for bit."""
        state = self._peft
        if not state.routing.merged:
            raise MergeError("unmerge_adapter: no adapter is merged")
        with Undo() as undo:
            undo.keep_state(state)
            unmerge(state, undo)
            state.snapshots = {}
            state.active = state.resting
            state.publish()
            state.routing.merged, state.routing.merged_for = (), {}

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        **request_arguments: Any,
    ) -> Any:
        """Fold adapters into the base weights and return the plain base model (this object, its class restored).

        Arguments and errors are those of `merge_adapter`.
        """
        state, model = self._peft, cast(nn.Module, self)
        _check_arguments(state, request_arguments)
        with Undo() as undo:
            undo.keep_state(state)
            if not state.routing.merged:
                names = names_to_merge(state, adapter_names)
                merge(state, names, undo, progressbar=progressbar, arguments=request_arguments)
            elif request_arguments or (adapter_names is not None and tuple(adapter_names) != state.routing.merged):
                require_unmerged(state, "merge_and_unload")
            leave(model, state, undo)
            note_ties(model, undo)
        return model

    def unload(self) -> Any:
        """Remove all adapters and return the base model as it came, trainability included."""
        state, model = self._peft, cast(nn.Module, self)
        with Undo() as undo:
            undo.keep_state(state)
            unmerge(state, undo)
            leave(model, state, undo)
        return model


def _check_arguments(state: PeftState, arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name not in state.routing.arguments:
            declared = state.routing.arguments
            raise RequestError(
                f"merging got the argument {name!r}, which no adapter of the model declares; they declare "
                f"{list(declared) or 'none'}.{did_you_mean(name, declared)}"
            )

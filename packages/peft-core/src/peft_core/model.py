"""`get_peft_model`, and what it returns: the user's own model object with adapters at its sites.

The object's class is exchanged for a subclass of its own class that adds the methods below (see `subclass.py`), so
`isinstance`, the signature of `forward`, `generate`, pipelines, `Trainer`, export and compile see the model they
know.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import checkpoint, status
from .config import AdapterConfig
from .errors import AdapterNameError, CheckpointError, MergeError, PeftError
from .inject import detach
from .layout import collect
from .lifecycle import activate_records, checked_draft, install, leave, note_ties, require_unmerged
from .loading import load_into
from .matching import LoadReport
from .merging import merge, names_to_merge, unmerge
from .records import PeftState
from .routing import BASE, Request
from .subclass import base_class, rebuild
from .transaction import Undo
from .tree import walk

NO_STATE = "this model has no adapters; make one with get_peft_model(model, config)"


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    mixed: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt `model` in place and return it, its base frozen and the new adapter active and trainable.

    Args:
        peft_config: the method's config; it is not changed (`model.peft_config[name]` holds the resolved copy).
        autocast_adapter_dtype: keep the adapters of half-precision layers in float32. They compute in the layer's
            dtype either way.
        revision: noted in the config that is saved.
        mixed, low_cpu_mem_usage: accepted from callers that pass them; methods always mix, and tensors that a file
            will fill are never initialised.

    Raises:
        TargetError: the config does not fit the model; all problems are listed, and nothing was changed.
        AdapterNameError: the name is malformed or in use.
        MethodError: the method's plugin cannot be loaded.
    """
    if not isinstance(model, nn.Module):
        raise PeftError(f"get_peft_model adapts a torch.nn.Module, not a {type(model).__name__}")
    if not isinstance(peft_config, AdapterConfig):
        raise PeftError(
            f"get_peft_model needs a config of this library, such as load_method(name)(...), not a "
            f"{type(peft_config).__module__}.{type(peft_config).__qualname__}; change the import line of the config"
        )
    found = checked_draft(model, adapter_name, peft_config, autocast_adapter_dtype, revision)
    install(model, found, trainable=not peft_config.inference_mode, activate=True)
    return model


class PeftModel:
    """The methods a model gains. `PeftModel.from_pretrained(model, directory)` loads a saved adapter."""

    _peft: PeftState
    _hf_peft_config_loaded = True

    # -- calling -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward. `adapter_names` chooses an adapter for each row of the batch.

        Adapted layers must see the rows in the batch's order: in their first dimension, or flattened together with the
        positions. A layer that is called on gathered tokens (a router written by hand) or on sequence-first tensors
        sees them in another order, and that cannot be told where the number of names divides the size.

        Raises `RequestError` where the names do not fit the batch or a method cannot be chosen per row.
        """
        forward = super().__call__  # type: ignore[misc]
        routing, rows = self._peft.routing, rows_of(self._peft, adapter_names)
        if torch.compiler.is_compiling():
            request = routing.default if rows is None else Request(routing.default.active, rows)
            return routing.traced(request, forward, *args, **kwargs)
        request = routing.request(rows)
        if request != routing.default and getattr(self, "_compiled_call_impl", None) is not None:
            forward = self._call_impl  # type: ignore[attr-defined]  # the compiled graph is the standing choice's
        with routing.use(request):
            return forward(*args, **kwargs)

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Resolved configs by adapter name."""
        return {name: record.config for name, record in self._peft.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, innermost first (whether or not they are switched off for now)."""
        return list(self._peft.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list where there are several."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> AdapterConfig:
        """Config of the (first) active adapter."""
        return self._peft.record(self._peft.active[0] if self._peft.active else "").config

    def add_adapter(
        self, adapter_name: str, peft_config: AdapterConfig, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add one more adapter, of any method, trainable once it is active. It is not activated.

        Raises as `get_peft_model`.
        """
        found = checked_draft(_module(self), adapter_name, peft_config, autocast_adapter_dtype, None)
        install(_module(self), found, trainable=not peft_config.inference_mode, activate=False)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, the last one outermost; several act together.

        An adapter's tensors require gradients while it is active and trainable; `inference_mode` activates
        without gradients.
        """
        state = self._peft
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        records = [state.record(name) for name in names]
        if len(set(names)) != len(names):
            raise AdapterNameError(f"set_adapter: a name is given twice in {list(names)}")
        require_unmerged(state, "set_adapter")
        with Undo() as undo:
            undo.keep_state(state)
            activate_records(state, records, undo, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters are trainable; takes effect on the active ones at once, on others when active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with Undo() as undo:
            for record in [self._peft.record(name) for name in names]:
                undo.keep_flags(record)
                record.trainable = requires_grad
                record.require_grad(requires_grad and record.name in self._peft.active)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and free its tensors."""
        state = self._peft
        state.record(adapter_name)
        require_unmerged(state, "delete_adapter")
        with Undo() as undo:
            undo.keep_state(state)
            detach(_module(self), state, adapter_name, undo)
            state.active = tuple(name for name in state.active if name != adapter_name)
            state.publish()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model alone; nested use and exceptions leave the state as it was."""
        state = self._peft
        before = state.enabled
        state.enabled = False
        state.publish()
        try:
            yield
        finally:
            state.enabled = before
            state.publish()

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        self._peft.enabled = False
        self._peft.publish()

    def enable_adapter_layers(self) -> None:
        """Switch the active adapters on again."""
        self._peft.enabled = True
        self._peft.publish()

    disable_adapters = disable_adapter_layers
    enable_adapters = enable_adapter_layers

    # -- merging and leaving -------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, *, progressbar: bool = False
    ) -> None:
        """Fold adapters (default: the active ones) into the base weights; `unmerge_adapter` is exact.

        Non-finite results are always refused, so `safe_merge` may stay as it is. Raises `MergeError`, with every
        weight as it was.
        """
        state = self._peft
        require_unmerged(state, "merge_adapter")
        names = names_to_merge(state, adapter_names)
        with Undo() as undo:
            undo.keep_state(state)
            state.snapshots = merge(state, names, undo, progressbar=progressbar)
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
            state.routing.merged = ()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """Fold adapters into the base weights and return the plain base model (this object, its class restored)."""
        state, model = self._peft, _module(self)
        with Undo() as undo:
            undo.keep_state(state)
            if not state.routing.merged:
                merge(state, names_to_merge(state, adapter_names), undo, progressbar=progressbar)
            elif adapter_names is not None and tuple(adapter_names) != state.routing.merged:
                require_unmerged(state, "merge_and_unload")
            leave(model, state, undo)
            note_ties(model, undo)
        return model

    def unload(self) -> Any:
        """Remove all adapters and return the base model as it came, trainability included."""
        state, model = self._peft, _module(self)
        with Undo() as undo:
            undo.keep_state(state)
            unmerge(state, undo)
            leave(model, state, undo)
        return model

    def get_base_model(self) -> Any:
        """The model itself: adapters sit inside it, nothing is wrapped around it."""
        return self

    def base_state_dict(self) -> dict[str, Tensor]:
        """The base's weights and persistent buffers under their original names, whatever adapters there are."""
        found: dict[str, Tensor] = {}
        for path, module in walk(_module(self)).modules:
            dot = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found[dot + name] = parameter.detach()
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[dot + name] = buffer
        return found

    # -- reports -------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return status.count_parameters(_module(self))

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, and the share."""
        print(status.trainable_line(_module(self)))

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of each adapted module."""
        return status.layer_status(self._peft)

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of the whole model."""
        return status.model_status(_module(self), self._peft)

    # -- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        save_embedding_layers: bool | str = "auto",
        state_dict: Mapping[str, Any] | None = None,
        save_function: Any = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write adapters, and nothing of the base: `default` into the directory, others into folders of their name.

        `state_dict`, `save_function` and `max_shard_size`, which transformers' callers pass, are not needed: every
        adapter knows its tensors, and they go into one file. Tables of embeddings that were trained are parts of
        adapters (`modules_to_save`); no other is written, so `save_embedding_layers` may stay "auto", or be False.

        Raises `CheckpointError` where the files cannot be written; the directory then holds what it held before.
        """
        if not safe_serialization:
            raise CheckpointError("adapters are written as safetensors only; leave out safe_serialization=False")
        if save_embedding_layers not in ("auto", False):
            raise CheckpointError(
                "save_embedding_layers: the base's tables are not written next to an adapter; train them with it, in "
                "modules_to_save, or save the base's weights (base_state_dict) in a file of their own"
            )
        state = self._peft
        records = [state.record(name) for name in (state.adapters if selected_adapters is None else selected_adapters)]
        if not is_main_process:
            return
        base_name = getattr(self, "name_or_path", None) or None
        for record in records:
            folder = Path(save_directory) if record.name == "default" else Path(save_directory) / record.name
            checkpoint.save(folder, record, base_model_name_or_path=base_name, base_class=base_class(type(self)))

    @classmethod
    def from_pretrained(cls, model: Any, model_id: Any = None, adapter_name: str = "default", **kwargs: Any) -> Any:
        """Load a saved adapter onto `model`, in place, and activate it. The model's train or eval mode stays.

        Keyword arguments are those of `load_adapter`. Raises as `load_adapter`.
        """
        if not isinstance(model, nn.Module) or model_id is None:
            own: Any = base_class(cls)
            if own is not cls and hasattr(own, "from_pretrained"):
                extra = {} if adapter_name == "default" else {"adapter_name": adapter_name}
                args = (model,) if model_id is None else (model, model_id)
                return own.from_pretrained(*args, **extra, **kwargs)
            raise PeftError("PeftModel.from_pretrained takes the base model, then the adapter's directory")
        load_into(model, model_id, adapter_name, activate=True, **kwargs)
        return model

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
    ) -> LoadReport:
        """Load a saved adapter beside those present; it is not activated.

        Keyword arguments: `is_trainable=False`; `replace=False` (take the place of an adapter of that name; tensors
        keep their identity where nothing but values changes, so optimizers go on); `strict=True` (False: load what
        fits and report the rest); `config=None` (use this config, not the file's); `subfolder`, `revision`,
        `autocast_adapter_dtype=True`.

        Raises `CheckpointError` or `CheckpointMismatchError` (missing, unknown, mis-shaped or non-finite tensors, by
        name), `ConfigError`, `TargetError`, `MethodError`; the model is then as it was.
        """
        return load_into(_module(self), model_id, adapter_name, activate=False, **kwargs)

    def get_adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """One adapter's tensors under the keys of its file."""
        return collect(self._peft.record(adapter_name))

    # -- python --------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (rebuild, (base_class(type(self)),), *reduced[2:])


def rows_of(state: PeftState, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of a call's rows, checked. Raises `AdapterNotFoundError`."""
    if names is None:
        return None
    rows = (names,) if isinstance(names, str) else tuple(names)
    for name in dict.fromkeys(rows):
        if name != BASE:
            state.record(name)
    return rows


def _module(model: Any) -> nn.Module:
    return cast(nn.Module, model)

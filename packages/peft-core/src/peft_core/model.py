"""`get_peft_model`, and what it returns: the user's own model object with adapters at its sites.

The object's class is exchanged for a subclass of its own class that adds the methods below (see `subclass.py`), so
`isinstance`, the signature of `forward`, `generate`, pipelines, `Trainer`, export and compile see the model they
know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import status
from .adapter import Adapter
from .calls import Call, inputs_of, take_arguments
from .combining import combine
from .config import AdapterConfig
from .errors import AdapterNameError, PeftError
from .inject import detach
from .lifecycle import (
    activate_records,
    checked_draft,
    install,
    name_arguments,
    require_unmerged,
    trains,
    with_referred,
)
from .loss_terms import terms_of, with_terms
from .mergeable import Mergeable
from .records import PeftState
from .routing import BASE, Request
from .saveable import Saveable
from .subclass import base_class, forward_names, rebuild
from .training import parameter_groups
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
    calibration: Iterable[Any] | None = None,
) -> Any:
    """Adapt `model` in place and return it, its base frozen and the new adapter active and trainable.

    Args:
        peft_config: the method's config; it is not changed (`model.peft_config[name]` holds the resolved copy).
        autocast_adapter_dtype: keep the adapters of half-precision layers in float32. They compute in the layer's
            dtype either way.
        revision: noted in the config that is saved.
        mixed, low_cpu_mem_usage: accepted from callers that pass them; methods always mix, and tensors that a file
            will fill are never initialised.
        calibration: batches for methods whose start depends on data: mappings of the model's arguments, tuples of
            them, or single tensors. The model is run on them as it came, and comes out of it unchanged.

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
    found = checked_draft(model, adapter_name, peft_config, autocast_adapter_dtype, revision, calibration=calibration)
    install(model, found, trainable=not peft_config.inference_mode, activate=True)
    return model


class PeftModel(Mergeable, Saveable):
    """The methods a model gains. `PeftModel.from_pretrained(model, directory)` loads a saved adapter."""

    _peft: PeftState
    _hf_peft_config_loaded = True

    # -- calling -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward. `adapter_names` chooses an adapter for each row of the batch; request arguments that
        an adapter's config declares (`request_arguments`) are for the adapters alone.

        Adapted layers must see the rows in the batch's order: in their first dimension, or flattened together with the
        positions. A layer that is called on gathered tokens (a router written by hand) or on sequence-first tensors
        sees them in another order, and that cannot be told where the number of names divides the size.

        Raises `RequestError` where the names do not fit the batch or a method cannot be chosen per row.
        """
        state = self._peft
        routing, rows = state.routing, rows_of(state, adapter_names)
        forward = state.sites.get("") or super().__call__  # type: ignore[misc]
        call = self._describe(args, kwargs) if routing.describes_calls else None
        if torch.compiler.is_compiling():
            request = routing.default
            if rows is not None or call is not None:
                request = Request(routing.default.active, rows, call)
            return self._with_losses(routing.traced(request, forward, *args, **kwargs), request, args, kwargs)
        request = routing.request(rows, call)
        if request != routing.default and getattr(self, "_compiled_call_impl", None) is not None:
            forward = state.sites.get("") or self._call_impl  # type: ignore[attr-defined]  # that graph is the default's
        with routing.use(request):
            outputs = forward(*args, **kwargs)
        if call is not None and torch.is_grad_enabled():
            routing.follow(outputs, request)
        return self._with_losses(outputs, request, args, kwargs)

    def _describe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The facts of a call that begins; request arguments are taken out of `kwargs`."""
        routing, own = self._peft.routing, forward_names(type(self))
        arguments = take_arguments(own, kwargs, routing.arguments)
        outer = routing.outer()
        call = Call(
            inputs_of(own, args, kwargs),
            arguments,
            training=_module(self).training,
            outer=outer.call if outer else None,
        )
        call.expect_gradients()
        return call

    def _with_losses(self, outputs: Any, request: Request, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """In training, the output with what the adapters add to its loss."""
        if not (_module(self).training and torch.is_grad_enabled()):
            return outputs
        routing, terms = self._peft.routing, terms_of(self._peft, request)
        routing.loss_terms = terms
        if not terms or routing.defers_losses:
            return outputs
        inputs = inputs_of(forward_names(type(self)), args, kwargs)
        return with_terms(outputs, terms, inputs.get("labels") is not None)

    def adapter_losses(self) -> dict[str, Tensor]:
        """What the adapters added to the loss of the last call in training, by name; they are in `outputs.loss`.

        A model whose output has no loss leaves the sum to you: `loss + sum(model.adapter_losses().values())`.
        """
        return dict(self._peft.routing.loss_terms)

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
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        *,
        autocast_adapter_dtype: bool = True,
        calibration: Iterable[Any] | None = None,
    ) -> None:
        """Add one more adapter, of any method, trainable once it is active. It is not activated.

        Arguments and errors are those of `get_peft_model`.
        """
        found = checked_draft(
            _module(self), adapter_name, peft_config, autocast_adapter_dtype, None, calibration=calibration
        )
        install(_module(self), found, trainable=not peft_config.inference_mode, activate=False)

    def get_adapters(self, adapter_name: str = "default") -> dict[str, Adapter]:
        """The parts of one adapter by place: the path of the module it sits at, or `path:part`. Not copies.

        Raises `AdapterNotFoundError`.
        """
        return self._peft.record(adapter_name).placed

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "",
        *,
        config: AdapterConfig | None = None,
        **options: Any,
    ) -> Mapping[str, Any]:
        """Add an adapter that is made of others, with its own tensors; the sources stay as they are.

        Returns what the method reports, by site (how far an approximation is off, say). The method of the first source
        (or of `config`, the new adapter's, where it is given) knows what `combination_type` and `options` mean,
        and has a way of its own where none is named. The new adapter is trainable, and not activated.

        Raises `CombineError` where the adapters cannot be combined so, with nothing changed.
        """
        made, report = combine(_module(self), adapters, weights, adapter_name, combination_type, config, options)
        install(_module(self), made, trainable=True, activate=False)
        return report

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameters of the active adapters for an optimizer, grouped as their methods wish; all else that trains last.

        Raises `MethodContractError` where a method names a tensor twice, forgets one, or names a foreign one.
        """
        return parameter_groups(_module(self), lr, weight_decay)

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
        state = self._peft
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with Undo() as undo:
            for record in [state.record(name) for name in names]:
                undo.keep_flags(record)
                record.trainable = requires_grad
                record.require_grad(requires_grad and record.name in with_referred(state, state.active))
                if record.name in state.active:
                    for other in with_referred(state, [record.name])[1:]:
                        undo.keep_flags(state.adapters[other])
                        state.adapters[other].require_grad(trains(state, other))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and free its tensors."""
        state = self._peft
        state.record(adapter_name)
        require_unmerged(state, "delete_adapter")
        if users := state.users_of(adapter_name):
            raise AdapterNameError(f"adapter {adapter_name!r} is part of {users}; delete those first")
        if state.record(adapter_name).structure is not None and len(state.adapters) > 1:
            raise AdapterNameError(f"the model is built as adapter {adapter_name!r} wants it; delete the others first")
        referred = with_referred(state, [adapter_name])[1:] if adapter_name in state.active else []
        with Undo() as undo:
            undo.keep_state(state)
            detach(_module(self), state, adapter_name, undo)
            name_arguments(_module(self), state, undo)
            state.active = tuple(name for name in state.active if name != adapter_name)
            for record in (state.adapters[other] for other in referred if not trains(state, other)):
                undo.keep_flags(record)
                record.require_grad(False)
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

    # -- the base -----------------------------------------------------------------------------------------------

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

    # -- python --------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (rebuild, (base_class(type(self)), self._peft.routing.arguments), *reduced[2:])


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

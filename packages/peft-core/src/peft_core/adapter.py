"""What the author of a method writes: the parameters and the maths of one adapter on one layer.

The core owns the rest, once for everybody: the loop over active adapters, switching, stacking, rows of a batch,
merging and exact unmerging, device and dtype, trainability, state and files.

Classes are abstract or final: concrete adapters do not inherit from one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .banks import Seeded
from .errors import CheckpointMismatchError, MergeError
from .layers import BaseLayer, Params

if TYPE_CHECKING:
    from .link import Link


class Adapter(nn.Module):
    """One adapter on one layer. Subclasses override `forward` and, where it exists, `merge`.

    Subclasses allocate in `__init__` with `layer.parameter(...)` and give starting values in
    `reset_parameters`, which the core skips when a checkpoint will fill them.
    """

    by_values: ClassVar[bool] = False
    """Whether tensors of the same shapes compute the same whatever the config says."""

    rowwise: ClassVar[bool] = True
    """Whether each row of a batch is treated without regard to the other rows."""

    starts_as_base: bool = True
    """Whether the start leaves the base's function unchanged; set on the instance where it depends on the config."""

    uses_call: ClassVar[bool] = False
    """Whether `forward` reads `base.call`, the facts of the model's running call; see `peft_core.Call`."""

    may_be_empty: ClassVar[bool] = False
    """Whether a tensor without elements is a right state of it, and saved: a layer left with a rank of 0, say."""

    merge_is_approximate: str = ""
    """Why the merged weights do not compute quite what the adapter does; empty where they do. Merging then warns."""

    additive: bool = False
    """Whether the site may add the delta itself, past `forward`; the core sets it."""

    shared: Any
    """The module of tensors that several sites use, as `peft_prepare` filled it; set by the core after building."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__()
        self.layer = layer
        self.__dict__["shared"] = _NotYet(type(self).__name__)

    def reset_parameters(self) -> None:
        """Give every parameter its starting value."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        """Wrap the next callable. `base(*args, **kwargs)` runs everything below this adapter."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(base, *args, **kwargs)")

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """All rows of a batch in one computation, each with an adapter of its own.

        Optional: a faster form of what the core does by splitting the batch. `adapters` have this form in common,
        `index` (rows,) says which of them each row uses, -1 for none; `base` is the bare layer. Return `NotImplemented`
        where these adapters cannot be batched (unequal ranks, say).
        """
        return NotImplemented

    def losses(self) -> Mapping[str, Tensor]:
        """Scalar terms of the loss that depend on the adapter's tensors alone, by name.

        In training the core sums them over the sites of the active adapters and adds them to the model's loss. A
        term that depends on activations is added in `forward` with `base.call.add_loss`.
        """
        return {}

    def merge(self, params: Params) -> Params:
        """Weights with which the bare layer computes what layer and adapter compute. Must not write in place."""
        raise MergeError(
            f"{self.layer.path}: {type(self).__name__} cannot be expressed in the base layer's weights, so it cannot "
            "be merged; keep the adapter attached, or save it and load it where it is needed"
        )

    def effective(self, params: Params) -> Params:
        """As `merge`, for use within one call; values may stay factored as long as they act like tensors."""
        return self.merge(params)

    # -- state ---------------------------------------------------------------------------------------------------

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        """Every tensor that belongs in a checkpoint: slot name -> (owner, attribute)."""
        found: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in self.named_modules():
            dot = f"{prefix}." if prefix else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found[dot + name] = (module, name)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[dot + name] = (module, name)
        return found

    def state(self) -> dict[str, Tensor]:
        """Slot name -> tensor, the adapter's part of a checkpoint."""
        return {slot: getattr(owner, name) for slot, (owner, name) in self.slots().items()}

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Where a slot's value is kept: (owner, attribute, its part of `value`) for each tensor.

        Override it together with `slots` where a file holds several tensors as one: the slot's attribute is then a
        property that puts them together, and this takes them apart. `value` has the slot's shape.
        """
        owner, name = self.slots()[slot]
        yield owner, name, value

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of the exact slots and shapes of `state()`; dtype and device become the adapter's own.

        Raises `CheckpointMismatchError` before anything changes.
        """
        slots = self.slots()
        if slots.keys() != tensors.keys():
            raise CheckpointMismatchError(
                f"{self.layer.path}: missing {sorted(slots.keys() - tensors.keys())}, "
                f"unknown {sorted(tensors.keys() - slots.keys())}"
            )
        for slot, (owner, name) in slots.items():
            if getattr(owner, name).shape != tensors[slot].shape:
                raise CheckpointMismatchError(
                    f"{self.layer.path}.{slot}: the file has shape {tuple(tensors[slot].shape)}, "
                    f"the adapter {tuple(getattr(owner, name).shape)}"
                )
        for slot, (owner, _) in slots.items():
            if isinstance(owner, Seeded):
                owner.check(tensors[slot], self.layer.path)
        for owner, name, part in [part for slot in slots for part in self.parts(slot, tensors[slot])]:
            old: Tensor = getattr(owner, name)
            device = self.layer.device if old.is_meta else old.device
            value = part.detach().to(device=device, dtype=old.dtype)
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
            else:
                owner._buffers[name] = value

    def values_like(self, other: Adapter | None) -> Mapping[str, Tensor]:
        """Values for the slots of this adapter with which it computes what `other` does; or nothing, where None.

        `other` is an adapter of the same method at the same layer, with another config. Override it where a method can
        do that (pad a rank, fold a scaling in), for hot swaps. Raises `CheckpointMismatchError` where it cannot be.
        """
        if self.by_values and type(other) is type(self):
            values = other.state()
            if {slot: tensor.shape for slot, tensor in values.items()} == {s: t.shape for s, t in self.state().items()}:
                return values
        reason = "has no part here" if other is None else "has another config or other shapes here"
        raise CheckpointMismatchError(
            f"{self.layer.path}: the other adapter {reason}, which {type(self).__name__} cannot express in the tensors "
            "that it has"
        )


class _NotYet:
    """What `Adapter.shared` is until the core sets it.

    `Adapter` has no `__getattr__` that could say so: it would be called for every tensor that is read.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self._owner}.shared is set after __init__; there, use the argument `shared` of peft_build"
        )


class DeltaAdapter(Adapter):
    """y = base(x) + delta(x). Write `delta` and `weight_delta`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Decided by the forward in force, not by ancestry: a subclass that overrides it is not additive.
        cls.additive = cls.forward is DeltaAdapter.forward

    def delta(self, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for input `x`, in the output's shape and dtype.

        At linear layers `x` is (rows, in) whatever the input's shape: positions are alike. If they are not,
        write `Adapter.forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define delta(x)")

    def weight_delta(self) -> Tensor:
        """What the adapter adds to the weight, in the weight's orientation (output rows first)."""
        raise MergeError(
            f"{self.layer.path}: {type(self).__name__} has no weight delta, so it cannot be merged; its author "
            "may define weight_delta()"
        )

    def accumulate(self, out: Tensor, x: Tensor) -> Tensor:
        """`out + delta(x)`; override where the sum can be fused with the last product."""
        return out + self.delta(x)

    def added(self, out: Tensor, x: Tensor) -> Tensor:
        """`accumulate` for input of the layer's own shape: a linear layer's deltas see flat rows."""
        if self.layer.kind != "linear" or x.dim() < 3:
            return self.accumulate(out, x)
        return self.accumulate(out.flatten(0, -2), x.flatten(0, -2)).reshape(out.shape)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self.added(base(*args, **kwargs), args[0])

    def merge(self, params: Params) -> Params:
        weight = params["weight"]
        return {**params, "weight": weight + self.weight_delta().to(weight.dtype)}


class WeightAdapter(Adapter):
    """The layer's own function with other weights. Write `merge`; a cheaper `forward` is welcome."""

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        # From the weights below, not from the layer's: adapters further in must not be lost.
        return base.layer.call(self.effective(base.params()), *args, **kwargs)


def as_compute(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the dtype of `like`; no operation where they agree."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def dropout(p: float) -> nn.Module | None:
    """A dropout module, or None at p = 0 so that the forward does not pay for a call that does nothing."""
    return nn.Dropout(p) if p > 0 else None

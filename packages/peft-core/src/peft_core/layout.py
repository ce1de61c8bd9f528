"""Which tensor of an adapter has which key in a file.

Key of a tensor: `base_model.model.` + path of the module in the user's model + `.` + what the method calls the slot
(`peft_state_key`). Tensors that belong to no site: `base_model.` + slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .banks import Seeded
from .errors import CheckpointError
from .hook_results import call
from .matching import PREFIX, SHARED_PREFIX

if TYPE_CHECKING:
    from .records import AdapterRecord


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter: slot `name` of the record's adapter number `index`, or of `shared` (None)."""

    index: int | None
    name: str
    tensor: Tensor

    def check(self, record: AdapterRecord, value: Tensor) -> None:
        """Raise `CheckpointMismatchError` for the checksum of other numbers than the adapter drew from its seed."""
        if self.index is None:
            owner = record.shared.get_submodule(self.name.rpartition(".")[0])
        else:
            owner = record.adapters[self.index].slots()[self.name][0]
        if isinstance(owner, Seeded):
            owner.check(value, record.name)

    def parts(self, record: AdapterRecord, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The adapter's own tensors that keep a value of this slot, each with its part of it."""
        if self.index is None:
            yield self.tensor, value
            return
        for owner, name, part in record.adapters[self.index].parts(self.name, value):
            yield getattr(owner, name), part


def layout(record: AdapterRecord) -> dict[str, Slot]:
    """Every tensor of an adapter by its key in files; tensors on the meta device as well.

    A `key_prefix` that starts with "/" stands for the whole beginning of the key, path included: for methods
    whose keys have neither prefix nor path in HF's layout.

    Raises `CheckpointError` where two tensors would have one key.
    """
    found: dict[str, Slot] = {}
    state_keys: dict[str, str] = {}

    def add(key: str, slot: Slot) -> None:
        if key in found:
            first, second = (_described(record, s) for s in (found[key], slot))
            raise CheckpointError(
                f"adapter {record.name!r}: {first} and {second} would both be {key!r} in a file, so one would be lost. "
                f"This is a mistake in the {record.method.label}: its peft_state_key must map different slots to "
                "different keys, and several parts at one module need a key_prefix each."
            )
        found[key] = slot

    for index, (request, adapter) in enumerate(zip(record.requests, record.adapters, strict=True)):
        for name, tensor in adapter.state().items():
            # A copy of a module is the core's own and keeps the module's names.
            if request.copied:
                state_key = name
            elif name in state_keys:
                state_key = state_keys[name]
            else:
                state_key = call(record.method, "peft_state_key", config=record.config, key=name)
                state_keys[name] = state_key
            if request.key_prefix.startswith("/"):
                key = request.key_prefix[1:] + state_key
            else:
                key = PREFIX + (f"{request.path}." if request.path else "") + request.key_prefix + state_key
            add(key, Slot(index, name, tensor))
    for name, tensor in persistent(record.shared).items():
        add(SHARED_PREFIX + name, Slot(None, name, tensor))
    return found


def collect(record: AdapterRecord) -> dict[str, Tensor]:
    """The tensors of an adapter, the objects themselves, by their keys in files. Raises `CheckpointError`."""
    return {key: slot.tensor for key, slot in layout(record).items()}


def _described(record: AdapterRecord, slot: Slot) -> str:
    if slot.index is None:
        return f"the shared tensor {slot.name!r}"
    request = record.requests[slot.index]
    part = f" (part {request.part!r})" if request.part else ""
    return f"{slot.name!r} at {request.path or 'the model itself'}{part}"


def persistent(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a module, by name."""
    found: dict[str, Tensor] = {}
    for prefix, inner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None and name not in inner._non_persistent_buffers_set:
                found[dot + name] = tensor
    return found

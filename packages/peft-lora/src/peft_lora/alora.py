"""aLoRA: a LoRA that acts from the invocation on, so that what comes before may be cached by the base alone.

Greenewald et al. 2025, "Activated LoRA", https://arxiv.org/abs/2504.12397, section 3: tokens from the invocation
sequence on see W + sBA, those before it see W.

The invocation is looked for in the prompt: its last occurrence in each row counts, from its first token on. A row
without one is the base's. Where it begins is remembered for a whole `generate`; in other calls that go on from a cache,
and for inputs without token ids, `alora_offsets` says it: how many of the row's last tokens are invoked (HF PEFT's
argument), None for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.calls import Call
from peft_core.errors import RequestError
from peft_core.layers import BaseLayer
from peft_core.link import Link

from .linear import LoraLinear

OFFSETS = "alora_offsets"


class ActivatedLora(Adapter):
    """The LoRA of one linear layer, whose part counts from the invocation on. It has no merged form."""

    uses_call: ClassVar[bool] = True

    def __init__(self, layer: BaseLayer, lora: LoraLinear, invocation: Sequence[int]) -> None:
        super().__init__(layer)
        self.lora = lora
        self.starts_as_base = lora.starts_as_base
        self.invocation = tuple(invocation)

    def reset_parameters(self) -> None:
        self.lora.reset_parameters()

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return self.lora.slots()

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        return self.lora.parts(slot, value)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state(tensors)
        self.lora.settle()

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        if other is not None and not (isinstance(other, ActivatedLora) and other.invocation == self.invocation):
            return dict(super().values_like(other))
        return self.lora.values_like(None if other is None else other.lora)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0]
        out: Tensor = base(*args, **kwargs)
        active = self._active(base.call, x)
        delta = self.lora.accumulate(torch.zeros_like(out), x)
        return out + delta.masked_fill(~active.view(*out.shape[:-1], 1), 0)

    def _active(self, call: Call, x: Tensor) -> Tensor:
        """(rows, length): which positions of this layer's input the adapter acts on."""
        name = f"begin of {self.invocation}"
        if name not in call.arguments:  # once per call, for all layers
            call.arguments[name] = self._begins(call, name)
        length = self._length(call)
        tokens = x.numel() // x.shape[-1]
        if tokens % length:
            raise RequestError(
                f"{self.layer.path}: its input of shape {tuple(x.shape)} is not one of {length} positions per row, so "
                "that an invocation cannot be found in it; adapt other layers"
            )
        begins = call.rows(name, tokens // length).to(x.device)
        positions = torch.arange(length, device=x.device) + call.past_length
        return positions >= begins[:, None]

    def _begins(self, call: Call, key: str) -> Tensor:
        """(rows,): the position at which each row's invocation begins, counted with what is cached."""
        total = call.past_length + self._length(call)
        if call.arguments.get(OFFSETS) is not None:
            offsets = [0 if offset is None else int(offset) for offset in call.arguments[OFFSETS]]
            begins = torch.tensor([total - offset if offset else _NEVER for offset in offsets])
            # A generation has more positions with each step; the argument counts from the end of the prompt.
            return call.carried.setdefault(key, begins) if call.generating else begins
        if call.past_length:
            if key not in call.carried:
                raise RequestError(
                    f"an aLoRA goes on from a cache, but the prompt is not known in this call; give {OFFSETS}: for "
                    "each row how many of its last tokens are invoked (with the present ones), or use generate"
                )
            found: Tensor = call.carried[key]
            return found
        ids = call.inputs.get("input_ids")
        if ids is None:
            raise RequestError(f"an aLoRA looks for its invocation in input_ids, and there are none; give {OFFSETS}")
        begins = last_occurrence(ids, self.invocation)
        call.carried[key] = begins
        return begins

    @staticmethod
    def _length(call: Call) -> int:
        named = (call.inputs.get("input_ids"), call.inputs.get("inputs_embeds"))
        given = next((v for v in (*named, *call.inputs.values()) if isinstance(v, Tensor) and v.dim() > 1), None)
        if given is None:
            raise RequestError("an aLoRA needs inputs of a model of sequences, (rows, length)")
        return int(given.shape[1])


_NEVER = 2**62


def last_occurrence(ids: Tensor, sequence: Sequence[int]) -> Tensor:
    """(rows,): where the last occurrence of `sequence` begins in each row of `ids`; a huge number if there is none."""
    wanted = torch.tensor(sequence, device=ids.device)
    if ids.shape[1] < len(sequence):
        return torch.full((len(ids),), _NEVER, device=ids.device)
    hits = (ids.unfold(1, len(sequence), 1) == wanted).all(-1)
    at = torch.arange(1, hits.shape[1] + 1, device=ids.device)
    last = (hits * at).amax(1) - 1
    return torch.where(last >= 0, last, torch.full_like(last, _NEVER))

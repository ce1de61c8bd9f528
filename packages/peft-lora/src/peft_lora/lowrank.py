"""What LoRA on linear layers, convolutions and embeddings has in common: A, B, and what they started from.

A start that is not the base itself (PiSSA and its like) is not taken out of the base, which is never written: its
factors A0 and B0 stay with the adapter, frozen, and the adapter computes s (B A - B0 A0). In files that is one LoRA of
twice the rank, [A; A0] and [B, -B0], which any reader of LoRA's files computes alike.

The difference is computed as

    B A - B0 A0 = (B - B0) A0 + B (A - A0),

one product of twice the rank. At the start it is exactly zero in every dtype, and later nothing large cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter, DeltaAdapter
from peft_core.errors import CheckpointMismatchError
from peft_core.layers import BaseLayer, ConvLayer

from . import starts
from .settings import Settings


class Anchor(nn.Module):
    """The factors that count as nothing: `a` is A0 and `b` is -B0, as files have it. Neither trains."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.a = a.requires_grad_(False)
        self.b = b.requires_grad_(False)


class LowRank(DeltaAdapter):
    """A (r, ...) and B (out, r, ...) under the names that the layer's kind gives them in files."""

    names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    layer: BaseLayer

    def __init__(self, layer: BaseLayer, settings: Settings, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        """`a` and `b` are the shapes of the factors."""
        super().__init__(layer)
        self.settings = settings
        self.starts_as_base = settings.init is not False
        self.scaling = settings.scaling
        self.register_parameter(self.names[0], layer.parameter(*a))
        self.register_parameter(self.names[1], layer.parameter(*b))
        self.anchor = Anchor(layer.parameter(*a), layer.parameter(*b)) if settings.anchored else None
        self.unanchored = False
        """Whether the file to be loaded lacks A0 and B0, so that they are to be computed from the base again."""

    @property
    def a(self) -> nn.Parameter:
        """A, the trained one."""
        return self.get_parameter(self.names[0])

    @property
    def b(self) -> nn.Parameter:
        """B, the trained one."""
        return self.get_parameter(self.names[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A' (rank, ...) and B' (out, rank, ...) whose product, times `scaling`, is the adapter's delta."""
        a, b = self._parameters[self.names[0]], self._parameters[self.names[1]]
        assert a is not None and b is not None
        if self.anchor is None:
            return a, b
        return torch.cat((self.anchor.a, a - self.anchor.a)), torch.cat((b + self.anchor.b, b), 1)

    def own(self) -> Iterable[Tensor]:
        """Its tensors (past `parameters()`, whose walk takes longer than a small product)."""
        mine: Any = self._parameters.values()
        return mine if self.anchor is None else (*mine, self.anchor.a, self.anchor.b)

    def reset_parameters(self) -> None:
        starts.begin(self)

    def drop_anchor(self) -> None:
        """Let the present A and B be what counts as nothing."""
        if self.anchor is not None:
            self.anchor.a.copy_(self.a)
            torch.neg(self.b, out=self.anchor.b)

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        """Factors with zeros up to this adapter's rank; the other scaling goes into B."""
        if other is None:
            return {slot: torch.zeros_like(tensor) for slot, tensor in self.state().items()}
        bias: Tensor | None = getattr(self, "lora_bias", None)
        theirs: Tensor | None = getattr(other, "lora_bias", None)
        if not isinstance(other, type(self)) or self.anchor is not None or (bias is None and theirs is not None):
            return dict(super().values_like(other))
        groups = self.layer.groups if isinstance(self.layer, ConvLayer) else 1
        ratio = other.scaling / self.scaling
        values = dict(zip(self.names, fitted(self, other.factors(), self.settings.r, groups), strict=True))
        values[self.names[1]] = values[self.names[1]] * ratio
        if bias is not None:
            values["lora_bias"] = torch.zeros_like(bias) if theirs is None else theirs * ratio
        return values

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def whole_a(self) -> Tensor:
        """[A; A0] as files have it."""
        assert self.anchor is not None
        return torch.cat((self.a, self.anchor.a)).detach()

    @property
    def whole_b(self) -> Tensor:
        """[B, -B0] as files have it."""
        assert self.anchor is not None
        return torch.cat((self.b, self.anchor.b), 1).detach()

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        found = {slot: where for slot, where in super().slots().items() if not slot.startswith("anchor.")}
        if self.anchor is not None and not self.unanchored:
            found[self.names[0]] = (self, "whole_a")
            found[self.names[1]] = (self, "whole_b")
        return found

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        if self.anchor is None or self.unanchored or slot not in self.names:
            yield from super().parts(slot, value)
            return
        dim = self.names.index(slot)
        mine, start = (half.clone(memory_format=torch.contiguous_format) for half in value.chunk(2, dim))
        yield self, slot, mine
        yield self.anchor, "ab"[dim], start

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state(tensors)
        self.settle()

    def settle(self) -> None:
        """After loading: compute A0 and B0 from the base where the file lacked them."""
        if not self.unanchored:
            return
        assert self.anchor is not None
        a, b = starts.taken_out(self)
        device, dtype = self.a.device, self.a.dtype
        self.anchor.a = nn.Parameter(a.to(device, dtype), requires_grad=False)
        self.anchor.b = nn.Parameter(b.neg().to(device, dtype), requires_grad=False)
        self.unanchored = False


def fitted(
    adapter: Adapter, factors: tuple[Tensor, Tensor], r: int, groups: int = 1, stacked: int = 1
) -> tuple[Tensor, Tensor]:
    """A (stacked · rank, ...) and B (out, rank / groups, ...) with zeros up to rank `r`, in each group of A's rows.

    Raises `CheckpointMismatchError` where the rank is larger.
    """
    a, b = factors
    rank = a.shape[0] // stacked
    missing = (r - rank) // groups
    if missing < 0:
        raise CheckpointMismatchError(
            f"{adapter.layer.path}: the other adapter has rank {rank}, and this one has room for {r}; make room with "
            f"prepare_model_for_compiled_hotswap(model, target_rank={rank}) before the model is compiled"
        )
    rows = a.view(groups * stacked, -1, *a.shape[1:])
    rows = torch.cat((rows, rows.new_zeros((groups * stacked, missing, *a.shape[1:]))), 1)
    return rows.flatten(0, 1), torch.cat((b, b.new_zeros((b.shape[0], missing, *b.shape[2:]))), 1)

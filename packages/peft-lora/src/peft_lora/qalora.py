"""QA-LoRA: one column of A for each group of inputs, so that a base quantised by groups takes the adapter in whole.

Xu et al. 2023, "QA-LoRA: Quantization-Aware Low-Rank Adaptation", https://arxiv.org/abs/2309.14717, section 3.3. ΔW is
constant within a group, and is absorbed by the group's zero point. With p the mean of x over each group of g inputs,

    y = base(x) + s B A (p · in / g).

The paper multiplies the mean by g; the factor here is that of HF PEFT, whose files it must read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_core.adapter import Adapter, DeltaAdapter, as_compute, dropout
from peft_core.layers import BaseLayer

from .lowrank import fitted
from .settings import Settings, start


class QaLora(DeltaAdapter):
    """A (r, in / g), B (out, r), on a linear layer whose inputs g divides."""

    def __init__(self, layer: BaseLayer, settings: Settings, group: int) -> None:
        super().__init__(layer)
        columns: int = layer.in_features  # type: ignore[attr-defined]
        stored: int | None = getattr(layer, "group_size", None)
        if columns % group:
            raise layer.refuse(f"qalora_group_size={group} does not divide its {columns} inputs")
        if stored is not None and stored != group:
            raise layer.refuse(
                f"it is quantised in groups of {stored}, and qalora_group_size is {group}; make them equal"
            )
        self.settings = settings
        self.group = group
        self.starts_as_base = settings.init is not False
        self.scaling = settings.scaling
        self.lora_A = layer.parameter(settings.r, columns // group)
        self.lora_B = layer.parameter(layer.out_features, settings.r)  # type: ignore[attr-defined]
        self.dropout = dropout(settings.dropout)

    def reset_parameters(self) -> None:
        start(self.lora_A, self.lora_B, None, self.settings.init, self.settings.r)

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        if other is None:
            return {slot: torch.zeros_like(tensor) for slot, tensor in self.state().items()}
        if not isinstance(other, QaLora) or other.group != self.group:
            return dict(super().values_like(other))
        a, b = fitted(self, (other.lora_A, other.lora_B), self.settings.r)
        return {"lora_A": a, "lora_B": b * (other.scaling / self.scaling)}

    def delta(self, x: Tensor) -> Tensor:
        x = x if self.dropout is None else self.dropout(x)
        groups = self.lora_A.shape[1]
        pooled = x.unflatten(-1, (groups, self.group)).mean(-1)
        hidden = torch.matmul(pooled, as_compute(self.lora_A, x).t()) * (self.scaling * groups)
        return torch.matmul(hidden, as_compute(self.lora_B, x).t())

    def weight_delta(self) -> Tensor:
        factor = self.scaling * self.lora_A.shape[1] / self.group
        return (self.lora_B @ self.lora_A * factor).repeat_interleave(self.group, 1)

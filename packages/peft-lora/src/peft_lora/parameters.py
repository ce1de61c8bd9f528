"""LoRA on single parameters (`target_parameters`): matrices, and stacks of them such as fused experts.

For a stack W (e, d1, d2), with per-matrix rank r, files hold A (r·e, fan-in) and B (fan-out, r·e): A is e
blocks of r rows, B is (fan-out, r, e), that is, column = rank · e + matrix. ΔW[i] = s B[:, :, i] A[i],
transposed back where the module stores its matrices transposed. This is the layout of HF PEFT since 0.19.1.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from peft_core.adapter import Adapter, WeightAdapter
from peft_core.layers import BaseLayer, Params, is_conv1d

from .factored import Factored
from .lowrank import fitted
from .settings import Settings, start


class LoraParameter(WeightAdapter):
    """The factors of one parameter, whose name is `layer.request.names[0]`."""

    def __init__(self, layer: BaseLayer, settings: Settings) -> None:
        super().__init__(layer)
        (self.name,) = layer.request.names
        stored = layer.module.get_parameter(self.name)
        if stored.dim() not in (2, 3) or not stored.is_floating_point():
            raise layer.refuse(f"{self.name} is {stored.dtype} of shape {tuple(stored.shape)}, not a stack of matrices")
        self.settings = settings
        self.starts_as_base = settings.init is not False
        self.scaling = settings.scaling
        self.count = stored.shape[0] if stored.dim() == 3 else 1
        self.stacked = stored.dim() == 3
        self.transposed = bool(getattr(layer.module, "is_transposed", False))
        # The core's view of a Conv1D turns its weight round; the factors are for the weight as stored.
        self.turned = is_conv1d(layer.module) and self.name == "weight"
        fan_out, fan_in = stored.shape[-2:][::-1] if self.transposed else stored.shape[-2:]
        self.lora_A = layer.parameter(settings.r * self.count, fan_in)
        self.lora_B = layer.parameter(fan_out, settings.r * self.count)

    def reset_parameters(self) -> None:
        start(self.lora_A, self.lora_B, None, self.settings.init, self.settings.r)

    def values_like(self, other: Adapter | None) -> dict[str, Tensor]:
        if other is None:
            return {slot: torch.zeros_like(tensor) for slot, tensor in self.state().items()}
        if not isinstance(other, LoraParameter):
            return dict(super().values_like(other))
        factors = other.lora_A, other.lora_B.view(other.lora_B.shape[0], -1, self.count)
        a, b = fitted(self, factors, self.settings.r, stacked=self.count)
        return {"lora_A": a, "lora_B": b.flatten(1) * (other.scaling / self.scaling)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """U (e, d1, r) and D (e, r, d2), or without the first axis, with ΔW = s U D in the weight's orientation."""
        down = self.lora_A.view(self.count, -1, self.lora_A.shape[1])
        up = self.lora_B.view(self.lora_B.shape[0], -1, self.count).permute(2, 0, 1).contiguous()
        if self.transposed is not self.turned:
            up, down = down.transpose(1, 2), up.transpose(1, 2)
        return (up, down) if self.stacked else (up[0], down[0])

    def merge(self, params: Params) -> Params:
        weight = params[self.name]
        up, down = self.factors()
        return {**params, self.name: weight + ((up @ down) * self.scaling).to(weight.dtype)}

    def effective(self, params: Params) -> Params:
        """As `merge`, the sum left unformed (in a compiled graph it is formed: the compiler knows tensors only)."""
        if torch.compiler.is_compiling():
            return self.merge(params)
        up, down = self.factors()
        return {**params, self.name: cast(Any, Factored(params[self.name], up, down, self.scaling))}

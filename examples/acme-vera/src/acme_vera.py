"""VeRA: vector-based random matrix adaptation, Kopiczko et al. 2024, https://arxiv.org/abs/2310.11454, equation 2.

    y = W₀ x + Λ_b B Λ_d A x

A (r, in) and B (out, r) are random, frozen and shared by all layers, which use the corner of their own size. What is
learned are the diagonals b (out,) and d (r,) of each layer.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peft_core import BaseLayer, DeltaAdapter, LinearLayer, TargetedConfig, as_compute, hookimpl


class VeraConfig(TargetedConfig):
    peft_type: ClassVar[str] = "VERA"
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")
    written_if_set: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})  # HF PEFT's class has no such field

    r: int = Field(256, ge=1)
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    init_weights: bool = True


class VeraAdapter(DeltaAdapter):
    def __init__(self, layer: LinearLayer, config: VeraConfig) -> None:
        super().__init__(layer)
        self.config, self.rows, self.columns = config, layer.out_features, layer.in_features
        self.vera_lambda_b = layer.parameter(layer.out_features)
        self.vera_lambda_d = layer.parameter(config.r)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.config.d_initial)

    def projections(self) -> tuple[Tensor, Tensor]:
        return self.shared.vera_A[:, : self.columns], self.shared.vera_B[: self.rows]

    def delta(self, x: Tensor) -> Tensor:
        a, b = self.projections()
        x = F.dropout(x, self.config.vera_dropout, self.training)
        hidden = F.linear(x, as_compute(a, x)) * as_compute(self.vera_lambda_d, x)
        return F.linear(hidden, as_compute(b, x)) * as_compute(self.vera_lambda_b, x)

    def weight_delta(self) -> Tensor:
        a, b = self.projections()
        return self.vera_lambda_b[:, None] * (b @ (self.vera_lambda_d[:, None] * a))


@hookimpl
def peft_config() -> type[VeraConfig]:
    return VeraConfig


@hookimpl
def peft_prepare(config: VeraConfig, layers: Sequence[BaseLayer], shared: nn.Module) -> None:
    linear = [_linear(layer) for layer in layers]
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    sizes = {
        "vera_A": (config.r, max(layer.in_features for layer in linear)),
        "vera_B": (max(layer.out_features for layer in linear), config.r),
    }
    for name, size in sizes.items():
        values = nn.init.kaiming_uniform_(torch.empty(size), generator=generator)
        values = values.to(layers[0].device, layers[0].dtype)
        shared.register_buffer(name, values, persistent=config.save_projection)


@hookimpl
def peft_build(config: VeraConfig, layer: BaseLayer) -> VeraAdapter:
    return VeraAdapter(_linear(layer), config)


def _linear(layer: BaseLayer) -> LinearLayer:
    if not isinstance(layer, LinearLayer):
        raise layer.refuse("VeRA adapts linear layers")
    return layer

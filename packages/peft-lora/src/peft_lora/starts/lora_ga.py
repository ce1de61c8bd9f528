"""LoRA-GA: A and B start so that the first step moves the weight as full fine-tuning would.

Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", https://arxiv.org/abs/2407.05000,
theorem 3.1 and algorithm 1: with G = U S Vᵀ the gradient of the loss for W, A takes r right singular vectors and B r
left ones, together the first 2r; theorem 3.2: both times d_out^¼ / √γ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_core.calibration import Batches
from peft_core.errors import ConfigError
from peft_core.layers import BaseLayer
from peft_core.records import AdapterState
from peft_lora.config import LoraConfig
from peft_lora.settings import Patterns
from peft_lora.start_configs import LoraGAConfig

from . import truncated
from .weight import anchored, matrix


def calibrate(config: LoraConfig, layers: Sequence[BaseLayer], batches: Batches) -> AdapterState:
    """A and B for each layer, in the form that files have, from the mean gradient over the batches. One pass.

    Raises `ConfigError` where there is no loss, no gradient, or none that is finite.
    """
    ga = config.lora_ga_config or LoraGAConfig()
    patterns = Patterns(config, trusted=True)
    for layer in layers:
        stored = layer.module._parameters.get("weight")
        if stored is None or not stored.is_floating_point():
            raise layer.refuse(
                "init_lora_weights='lora_ga' starts from the gradient of its weight, and one that is stored "
                "quantised has no gradient"
            )
        r, smaller = patterns.settings(layer.path).r, min(layer.in_features, layer.out_features)  # type: ignore[attr-defined]
        if 2 * r > smaller:
            raise layer.refuse(
                f"init_lora_weights='lora_ga' takes 2r = {2 * r} directions, and it has {smaller}; lower r"
            )
    gradients = _gradients(layers, batches)
    tensors = {}
    for layer in layers:
        settings = patterns.settings(layer.path)
        weight = matrix(layer) if ga.scale == "weight_svd" else None
        a, b = factors(gradients.pop(layer.path), settings.r, settings.scaling, ga, weight)
        tensors[layer.path] = anchored(a, b)
    return AdapterState(config, tensors)


def factors(
    gradient: Tensor, r: int, scaling: float, ga: LoraGAConfig, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) for a `gradient` (out, in); `weight` (out, in) for the scale "weight_svd".

    The scales: "stable" as in theorem 3.2; "unit" leaves singular vectors as they are; "gd_scale" divides both by s;
    "weight_svd" gives them the mean root of the weight's first r singular values over s.
    """
    u, _, vh = truncated.svd(gradient, 2 * r)
    if ga.direction == "ArBr":
        b, a = u[:, 0 : 2 * r : 2], vh[1 : 2 * r : 2]
    elif ga.direction == "A2rBr":
        b, a = u[:, :r], vh[r : 2 * r]
    elif ga.direction == "ArB2r":
        b, a = u[:, r : 2 * r], vh[:r]
    else:
        chosen = torch.randperm(2 * r, device=gradient.device)
        b, a = u[:, chosen[r:]], vh[chosen[:r]]
    length = 1.0
    if ga.scale == "stable":
        length = gradient.shape[0] ** 0.25 / ga.stable_gamma**0.5
    elif ga.scale == "gd_scale":
        length = 1 / abs(scaling)
    elif ga.scale == "weight_svd":
        assert weight is not None
        length = float((truncated.svd(weight, r)[1] / abs(scaling)).sqrt().mean())
    return a * length, b * length


def _gradients(layers: Sequence[BaseLayer], batches: Batches) -> dict[str, Tensor]:
    """The sum over the batches by path, in float32 or wider: it has the mean's directions."""
    sums: dict[str, Tensor] = {}
    count = 0

    def add(path: str, gradient: Tensor) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        sums[path] = sums[path].add_(gradient) if path in sums else gradient.to(wide, copy=True)

    for _ in batches.gradients(layers, each=add):
        count += 1
    for layer in layers:
        found = sums.get(layer.path)
        if found is None or not found.any():
            why = (
                "no calibration batches were given"
                if not count
                else "its weight gets no gradient from the batches' loss"
            )
            raise ConfigError(f"{layer.path}: {why}, and init_lora_weights='lora_ga' starts from gradients")
        if not torch.isfinite(found).all():
            raise ConfigError(f"{layer.path}: the gradient of the batches' loss holds NaN or infinity")
    return sums

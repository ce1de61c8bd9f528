"""CorDA: PiSSA with the weight's directions ordered by what they do to the inputs.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
https://arxiv.org/abs/2406.05223, equations 2 to 5: with C the covariance of the layer's inputs and W C = U S Vᵀ, the
weight is U S (Vᵀ C⁻¹). The "instruction-previewed" mode adapts its first r directions, the "knowledge-preserved" one
its last r.

As in the authors' code and HF PEFT, each batch is divided by its largest entry before its XᵀX is taken, C is the mean
of these, and a hundredth of its mean diagonal is added to the diagonal (doubled until C can be inverted).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from peft_core.calibration import Batches
from peft_core.errors import ConfigError
from peft_core.files import write_atomically
from peft_core.layers import BaseLayer
from peft_core.records import AdapterState
from peft_lora.config import LoraConfig
from peft_lora.settings import Patterns
from peft_lora.start_configs import CordaConfig

from .inputs import PerInput, rows
from .pissa import split
from .weight import anchored, matrix

DAMPING = 0.01
# C C⁻¹ may be this far from the identity, as in the authors' code.
INVERTED = 0.05


class Covariance:
    """The mean of XᵀX over batches of rows X."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.batches = 0

    def update(self, x: Tensor) -> None:
        """Take in rows (n, d)."""
        largest = x.max().abs()
        x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
        self.total = x.t() @ x if self.total is None else self.total.addmm_(x.t(), x)
        self.batches += 1

    @property
    def mean(self) -> Tensor:
        """C (d, d)."""
        assert self.total is not None
        return self.total / self.batches


def calibrate(config: LoraConfig, layers: Sequence[BaseLayer], batches: Batches) -> AdapterState:
    """A and B for each layer, in the form that files have. One pass. Raises `ConfigError`, `TargetError`."""
    corda = config.corda_config or CordaConfig()
    patterns = Patterns(config, trusted=True)
    covariances = _covariances(corda, layers, batches)
    tensors = {}
    for layer in layers:
        settings = patterns.settings(layer.path)
        a, b = factors(matrix(layer), covariances[layer.path], settings.r, settings.scaling, corda.corda_method, layer)
        tensors[layer.path] = anchored(a, b)
    return AdapterState(config, tensors)


def factors(
    weight: Tensor, covariance: Tensor, r: int, scaling: float, method: str, layer: BaseLayer
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) for `weight` (out, in) and the inputs' `covariance` (in, in).

    Raises `TargetError` where the covariance cannot be inverted.
    """
    covariance = covariance.to(weight)
    damped = _damped(covariance, layer)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    # C is symmetric: rows times C⁻¹ are the solution of C z = row.
    vh = torch.linalg.solve(damped, vh.t()).t()
    chosen = slice(0, r) if method == "ipm" else slice(len(s) - r, None)
    return split(u[:, chosen], s[chosen], vh[chosen], scaling)


def _damped(covariance: Tensor, layer: BaseLayer) -> Tensor:
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    level = covariance.diagonal().mean()
    damping = DAMPING
    while damping <= 1:
        damped = covariance + damping * level * identity
        inverse, info = torch.linalg.inv_ex(damped)
        if info == 0 and torch.dist(damped @ inverse, identity) < INVERTED:
            return damped
        damping *= 2
    raise layer.refuse(
        "its inputs are zero or not finite in all calibration batches, so their covariance has no inverse"
    )


def _covariances(corda: CordaConfig, layers: Sequence[BaseLayer], batches: Batches) -> dict[str, Tensor]:
    """C by path, from the file or from the batches; then also into the file, if one is named."""
    path = None if corda.covariance_file is None else Path(corda.covariance_file)
    if path is not None and path.is_file():
        return _read(path, layers)
    found = PerInput(lambda paths: Covariance())
    for seen in batches.inputs(layers):
        for covariance, x in found.groups(seen):
            covariance.update(rows(x))
    covariances = {layer.path: found.of(layer).mean for layer in layers}
    if path is not None:
        from safetensors.torch import save

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({name: c.cpu().clone() for name, c in covariances.items()}))
    return covariances


def _read(path: Path, layers: Sequence[BaseLayer]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"covariance_file {path} cannot be read: {error}. Delete it to have it made again."
        ) from error
    for layer in layers:
        size = layer.in_features  # type: ignore[attr-defined]
        if layer.path not in found or found[layer.path].shape != (size, size):
            raise ConfigError(
                f"covariance_file {path} has no covariance of {size} inputs for {layer.path}: it was made for other "
                "layers or another model. Name another file, or delete it to have it made again."
            )
    return {layer.path: found[layer.path] for layer in layers}

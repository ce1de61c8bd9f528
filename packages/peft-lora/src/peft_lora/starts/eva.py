"""EVA: A starts as the principal directions of the layer's inputs, and layers share the ranks by explained variance.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
https://arxiv.org/abs/2410.07170, algorithm 1. The directions are found batch by batch (Ross et al. 2008, "Incremental
Learning for Robust Visual Tracking", section 2.1: the mean is followed as well) until they have settled. B is zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_core.calibration import Batches
from peft_core.errors import ConfigError
from peft_core.layers import BaseLayer
from peft_core.records import AdapterState
from peft_lora.config import LoraConfig
from peft_lora.settings import Patterns, Settings
from peft_lora.start_configs import EvaConfig

from . import truncated
from .inputs import PerInput, rows


class Pca:
    """The `k` principal components of rows that come in batches."""

    def __init__(self, k: int, tau: float) -> None:
        self.k = k
        self.tau = tau
        self.count = 0
        self.settled = False
        self.components = torch.empty(0, 0)
        self.values = torch.empty(0)
        self.mean = torch.empty(0)
        self.total = torch.empty(0)

    def update(self, x: Tensor) -> None:
        """Take in rows (n, d); n ≥ 1."""
        n, mean = x.shape[0], x.mean(0)
        centred = x - mean
        total = centred.square().sum()
        stack = [centred]
        if self.count:
            share = self.count * n / (self.count + n)
            shift = self.mean - mean
            stack = [self.values.unsqueeze(1) * self.components, centred, math.sqrt(share) * shift.unsqueeze(0)]
            total = self.total + total + share * shift.square().sum()
            mean = (self.count * self.mean + n * mean) / (self.count + n)
        _, values, components = truncated.svd(torch.cat(stack), self.k)
        if self.count and len(self.values) == len(values) == self.k:
            cosines = (components * self.components).sum(1).abs()
            self.settled = bool((cosines >= self.tau).all())
        self.values, self.components = values, components
        self.mean, self.total, self.count = mean, total, self.count + n

    @property
    def ratios(self) -> list[float]:
        """The share of the inputs' variance that each component explains."""
        found: list[float] = (self.values.square() / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)).tolist()
        return found


def calibrate(config: LoraConfig, layers: Sequence[BaseLayer], batches: Batches) -> AdapterState:
    """The config with ranks, alphas and targets as the data have them, and A for each layer that keeps a rank.

    One pass at most; it ends as soon as every layer's components have settled. Raises `ConfigError`.
    """
    eva = config.eva_config or EvaConfig()
    patterns = Patterns(config, trusted=True)
    settings = {layer.path: patterns.settings(layer.path) for layer in layers}
    most = {layer.path: _most(layer, settings[layer.path], eva.rho) for layer in layers}
    # Layers with one input may ask for different numbers; the largest serves all.
    found = PerInput(lambda paths: Pca(max(most[path] for path in paths), eva.tau))
    for x, pca in _inputs(layers, batches, eva, found):
        pca.update(x)
    for layer in layers:
        if len(found.of(layer).values) < most[layer.path]:
            raise ConfigError(
                f"{layer.path}: the calibration batches have {found.of(layer).count} rows for this layer, and "
                f"rho · r = {most[layer.path]} directions need more; give more batches, or lower rho or r"
            )
    if any(not pca.settled for pca in found.all()):
        warnings.warn(
            "EVA: the inputs' directions had not settled when the batches ended; give more of them, or lower tau",
            stacklevel=2,
        )
    ranks = _share({layer.path: found.of(layer).ratios[: most[layer.path]] for layer in layers}, settings)
    tensors = {}
    for layer in layers:
        if rank := ranks[layer.path]:
            pca = found.of(layer)
            a = pca.components[:rank]
            if eva.whiten:
                a = a / pca.values[:rank].sqrt().clamp_min(torch.finfo(a.dtype).tiny).unsqueeze(1)
            tensors[layer.path] = {"lora_A": a.contiguous()}
    return AdapterState(_resolved(config, eva, ranks, settings), tensors)


def _most(layer: BaseLayer, settings: Settings, rho: float) -> int:
    """How many directions a layer may get: ρ r, and no more than it can have."""
    smaller = min(layer.in_features, layer.out_features)  # type: ignore[attr-defined]
    if settings.r > smaller:
        raise layer.refuse(
            f"init_lora_weights='eva': it has {smaller} directions at most, and the rank is {settings.r}"
        )
    return min(int(settings.r * rho), int(smaller))


def _inputs(
    layers: Sequence[BaseLayer], batches: Batches, eva: EvaConfig, found: PerInput[Pca]
) -> Iterator[tuple[Tensor, Pca]]:
    """The rows that each batch has for those whose components have not settled."""
    masks: list[Any] = []

    class Noted(Batches):
        """The batches, with the mask of the one at work noted."""

        def __iter__(self) -> Iterator[Any]:
            for batch in batches:
                masks[:] = [_mask(batch, eva)]
                yield batch

    for seen in Noted(batches.model, (), "").inputs(layers):
        groups = found.groups(seen)
        for pca, x in groups:
            mask = masks[0]
            if not pca.settled:
                kept = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x
                if kept.numel():
                    yield rows(kept), pca
        if groups and all(pca.settled for pca in found.all()):
            return


def _mask(batch: Any, eva: EvaConfig) -> Tensor | None:
    """Which positions count: those with a label, or else those that are not padding."""
    if not isinstance(batch, Mapping):
        return None
    if eva.use_label_mask and isinstance(batch.get("labels"), Tensor):
        return torch.ne(batch["labels"], eva.label_mask_value)
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) else None


def _share(ratios: Mapping[str, Sequence[float]], settings: Mapping[str, Settings]) -> dict[str, int]:
    """As many ranks as there were, to the directions that explain most, wherever they are."""
    best = sorted(((ratio, path) for path, found in ratios.items() for ratio in found), key=lambda item: -item[0])
    ranks = dict.fromkeys(ratios, 0)
    for _, path in best[: sum(one.r for one in settings.values())]:
        ranks[path] += 1
    return ranks


def _resolved(
    config: LoraConfig, eva: EvaConfig, ranks: Mapping[str, int], settings: Mapping[str, Settings]
) -> LoraConfig:
    """The config that has these ranks, and only layers with one."""
    kept = {path: rank for path, rank in ranks.items() if rank}
    keys = {path: _key(path, kept) for path in kept}
    alphas = {}
    for path, rank in kept.items():
        # alpha = s r, or s √r; with the scaling of the rank that was asked for, or with its alpha.
        old, new = (math.sqrt(n) if config.use_rslora else float(n) for n in (settings[path].r, rank))
        alphas[path] = settings[path].scaling * (new if eva.adjust_scaling_factors else old)
    dropped = len(kept) < len(ranks)
    return config.resolve(
        rank_pattern={keys[path]: rank for path, rank in kept.items() if rank != config.r},
        alpha_pattern={
            keys[path]: alpha for path, alpha in alphas.items() if not math.isclose(alpha, config.lora_alpha)
        },
        **({"target_modules": tuple(kept)} if dropped or not isinstance(config.target_modules, str) else {}),
    )


def _key(path: str, paths: Iterable[str]) -> str:
    """A pattern for `path` alone: the path, anchored where another one ends in it."""
    ambiguous = any(other.endswith(f".{path}") for other in paths)
    return "^" + path.replace(".", r"\.") + "$" if ambiguous else path

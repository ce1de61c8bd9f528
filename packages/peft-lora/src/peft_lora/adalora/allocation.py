"""Who gets which rank: the budget over time, and its distribution over the layers of one adapter.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
https://arxiv.org/abs/2303.10512, section 3 and algorithm 1; counted and rounded as in HF PEFT's `update_and_allocate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import AdaLoraConfig

if TYPE_CHECKING:
    from .layers import AdaLora


def budget(config: AdaLoraConfig, layers: int, step: int) -> tuple[int, bool]:
    """Rows kept over all layers at a step (0-based), and whether that step prunes; paper, equation 12."""
    assert config.total_step is not None
    most, least = config.init_r * layers, config.target_r * layers
    end = config.total_step - config.tfinal
    if step <= config.tinit:
        return most, False
    if step > end:
        return least, True
    left = 1 - (step - config.tinit) / (end - config.tinit)
    return int((most - least) * left**3 + least), step % config.deltaT == 0


class Allocation:
    """The allocation of one adapter, shared by its layers. Holds no tensor: those are the layers' buffers."""

    def __init__(self, layers: int, settled: bool) -> None:
        self.layers = layers
        self.settled = settled
        self.driven = False
        self.history: list[tuple[int, dict[str, int]]] = []
        """(step, {path: rank}) after each step that pruned."""
        self._watched: tuple[str, int] | None = None
        self._changes = 0

    def expect_driving(self, path: str, e: Tensor) -> None:
        """Called in each forward in training: warn, once, where an optimizer steps and nobody says so."""
        if self.driven or self.settled or torch.compiler.is_compiling():
            return
        if self._watched is not None and self._watched[0] != path:
            return
        if self._watched is not None and self._watched[1] != e._version:
            self._changes += 1  # written in place: an optimizer's step, or for once, values from elsewhere
        self._watched = path, e._version
        if self._changes == 2:
            self.driven = True
            warnings.warn(
                "AdaLoRA is being trained, and no rank is ever pruned: its steps are not driven. Write "
                "`peft_core.drive(model, optimizer)` once, before the training loop. (transformers' Trainer needs no "
                "call, unless PEFT_CORE_TRAINER=0 is set.)",
                stacklevel=2,
            )

    def act(
        self, config: AdaLoraConfig, adapters: Mapping[str, AdaLora], step: int, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, tuple[bool, ...]] | None:
        """After a step of the optimizer, with its gradients present.

        Returns which rows of each layer stay, by path, once the last step has settled it and the rest was cut off.
        """
        self.driven = True
        assert config.total_step is not None
        if self.settled:
            self._prune_again(adapters)  # where nothing was cut
            return None
        end, last = config.total_step - config.tfinal, step >= config.total_step - 1
        if step > end:
            self._prune_again(adapters)
        else:
            if step < end:
                for adapter in adapters.values():
                    adapter.observe(config.beta1, config.beta2)
            rows, due = budget(config, self.layers, step)
            # HF PEFT prunes at `end` whatever deltaT; the last step of all must too, or the budget is never reached.
            if (due or step == end or last) and step > config.tinit:
                self._prune(adapters, config.init_r * self.layers - rows, step)
        if not last:
            return None
        self.settled = True
        for adapter in adapters.values():
            adapter.forget()
        # Replicas in other processes expect gradients of the sizes that they began with.
        return None if _replicated() else settle(adapters, optimizer)

    def _prune(self, adapters: Mapping[str, AdaLora], count: int, step: int) -> None:
        """Zero the `count` least important rows over all layers (and any that are no more important)."""
        found = {path: adapter.importance() for path, adapter in adapters.items()}
        device = next(iter(found.values())).device
        together = torch.cat([scores.to(device) for scores in found.values()])
        if count > 0:
            mask = together <= together.kthvalue(count).values
            parts = torch.split(mask, [len(scores) for scores in found.values()])
            for adapter, part in zip(adapters.values(), parts, strict=True):
                adapter.prune(part.to(adapter.lora_E.device))
        kept = torch.stack([(adapter.lora_E != 0).sum().to(device) for adapter in adapters.values()])
        self.history.append((step, dict(zip(adapters, map(int, kept.tolist()), strict=True))))

    def note_pruned(self, adapters: Mapping[str, AdaLora]) -> None:
        """Before a step at which ranks stay: which rows are pruned is what E says now."""
        for adapter in adapters.values():
            adapter.pruned = adapter.lora_E.detach()[:, 0] == 0

    def _prune_again(self, adapters: Mapping[str, AdaLora]) -> None:
        for adapter in adapters.values():
            if adapter.pruned is not None:
                adapter.prune(adapter.pruned)
                adapter.pruned = None


def settle(
    adapters: Mapping[str, AdaLora], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, tuple[bool, ...]]:
    """Cut every layer to the rows that are not pruned; returns which these are, by path."""
    return {path: tuple(adapter.cut(optimizer)) for path, adapter in adapters.items()}


def _replicated() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )

"""Helpers of the tests of LoRA's starts: a small model of torch alone, with a loss, and batches for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import get_peft_model
from peft_lora import LoraConfig
from peft_lora.lowrank import LowRank

TARGETS = ["block.q", "block.k", "block.up", "down"]


class Block(nn.Module):
    """Two layers that read one tensor, and one that reads what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.k = nn.Linear(12, 12, bias=False)
        self.up = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(torch.tanh(self.q(x)) + self.k(x)))


class Net(nn.Module):
    """Embedding (20, 12), the block, a convolution over positions, and a classifier of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.block = Block()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.down = nn.Linear(16, 16)

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = self.block(self.embed(ids))
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.down(hidden)
        if labels is None:
            return {"logits": out}
        return {"logits": out, "loss": F.cross_entropy(out.flatten(0, 1).float(), labels.flatten())}


def net(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        # The first layers' inputs vary in many directions alike, the last one's in few.
        model.block.up.weight.data *= torch.logspace(0.5, -1.5, 12)
        return model.to(dtype).eval()


def batch(seed: int, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    often = torch.arange(1, 21).float().reciprocal()  # the inputs then have a few large directions
    ids = torch.multinomial(often, size * 6, replacement=True, generator=generator).view(size, 6)
    return {"ids": ids, "labels": ids % 16}


IDS = torch.arange(18).view(3, 6)
BATCHES = [batch(seed) for seed in range(6)]
FROM_WEIGHT = ("pissa", "pissa_niter_2", "olora", "mica")
FROM_DATA = ("eva", "corda", "lora_ga")
STARTS = (*FROM_WEIGHT, *FROM_DATA)


def config(start: Any, **fields: Any) -> LoraConfig:
    """Rank 3, s = 4/3, at the linear layers. EVA is told to be content with any directions."""
    if start == "eva":
        fields = {"eva_config": {"tau": 0.0}, **fields}
    return LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": start, **fields})


def adapted(start: Any, base: nn.Module | None = None, **fields: Any) -> Any:
    """A model with that start, in eval mode."""
    calibration = BATCHES if start in FROM_DATA else None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(net() if base is None else base, config(start, **fields), calibration=calibration).eval()


def lora(model: Any, path: str, name: str = "default") -> LowRank:
    """The adapter at a layer."""
    found = model.get_submodule(path).adapters.get_submodule(name)
    assert isinstance(found, LowRank)
    return found


def move(model: nn.Module, seed: int = 5) -> None:
    """Put the trained tensors elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Steps of SGD on fixed data; the losses before each."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(**batch(100 + step))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def weights(model: Any) -> Mapping[str, Tensor]:
    """Copies of the base's weights."""
    found = model.base_state_dict() if hasattr(model, "base_state_dict") else model.state_dict()
    return {name: tensor.clone() for name, tensor in found.items()}

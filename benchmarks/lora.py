"""LoRA beside Hugging Face PEFT and a hand-written floor: a training step, and putting the adapters in.

    hatch run bench [--repeats 7]

The floor is the least code that computes the same: a module that adds two products to a frozen linear layer's output.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.measure import table, times
from benchmarks.training_step import at_each_linear, llama, training_step
from peft_core import get_peft_model
from peft_lora import LoraConfig

RANK, ALPHA = 8, 16


class Floor(nn.Module):
    """y = W x + b + s B (A x), and nothing else."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) * 0.01)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.linear(x, self.a.to(x.dtype))
        base: Tensor = self.base(x)
        return base + torch.nn.functional.linear(hidden, self.b.to(x.dtype)) * (ALPHA / RANK)


def floor(model: nn.Module) -> nn.Module:
    return at_each_linear(model, Floor)


def ours(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def theirs(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


WAYS: dict[str, Any] = {"ours": ours, "HF peft": theirs, "floor": floor}


def step(dtype: torch.dtype, repeats: int) -> str:
    return training_step("Training step", WAYS, dtype, repeats)


def injection(layers: int, repeats: int) -> str:
    """Adapters at 7 linear layers of each of `layers` blocks, on the meta device."""
    with torch.device("meta"):
        models = {name: [llama(64, 128, layers) for _ in range(repeats + 1)] for name in WAYS}

    def adapt(name: str) -> None:
        WAYS[name](models[name].pop())

    seconds = times({name: partial(adapt, name) for name in WAYS}, repeats)
    rows = [[name, f"{s * 1000:.0f}", f"{s / seconds['floor']:.1f}"] for name, s in seconds.items()]
    return table(f"Putting {7 * layers} adapters in", ["", "ms", "time / floor"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    for dtype in (torch.float32, torch.bfloat16):
        print(step(dtype, repeats), end="\n\n")
    for layers in (32, 200):
        print(injection(layers, min(repeats, 5)), end="\n\n")


if __name__ == "__main__":
    main()

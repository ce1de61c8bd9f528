"""AdaLoRA, LoHa and LoKr beside Hugging Face PEFT and a hand-written floor: one training step.

    python -m benchmarks.lora_family [--repeats 7] [--methods loha,lokr,adalora]

A floor is the least code for the same maths: the factors act on x, and autograd does the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.training_step import at_each_linear, training_step
from peft_core import get_peft_model, load_method

RANK, ALPHA = 8, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "loha": {"r": RANK, "alpha": ALPHA},
    "lokr": {"r": RANK, "alpha": ALPHA},
    "adalora": {"init_r": RANK, "lora_alpha": ALPHA, "target_r": 4, "total_step": 1000, "orth_reg_weight": 0.0},
}
THEIRS: dict[str, Any] = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "adalora": peft.AdaLoraConfig}


class Floor(nn.Module):
    """A frozen linear layer and the factors beside it."""

    def __init__(self, base: nn.Linear, method: str) -> None:
        super().__init__()
        self.base = base
        self.act: Callable[[Tensor], Tensor] = getattr(self, method)
        i, o, r = base.in_features, base.out_features, RANK
        self.first = nn.ParameterList([nn.Parameter(torch.randn(r, i) * 0.01), nn.Parameter(torch.randn(o, r) * 0.01)])
        if method == "loha":
            pair = [nn.Parameter(torch.randn(r, i) * 0.01), nn.Parameter(torch.zeros(o, r))]
            self.second = nn.ParameterList(pair)
        elif method == "lokr":
            v, n = _near_square(i)
            u, k = _near_square(o)
            self.first = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.01) for s in ((u, v), (k, r), (r, n)))
        else:
            self.e = nn.Parameter(torch.zeros(r, 1))

    def loha(self, x: Tensor) -> Tensor:
        (a1, b1), (a2, b2) = self.first, self.second
        a = (a1[:, None] * a2[None]).flatten(0, 1).to(x.dtype)
        b = (b1[:, :, None] * b2[:, None]).flatten(1).to(x.dtype)
        return nn.functional.linear(nn.functional.linear(x, a), b)

    def lokr(self, x: Tensor) -> Tensor:
        c, b, a = (p.to(x.dtype) for p in self.first)
        hidden = nn.functional.linear(x.unflatten(-1, (c.shape[1], -1)), a)
        return nn.functional.linear(torch.einsum("lm,...mr->...lr", c, hidden), b).flatten(-2)

    def adalora(self, x: Tensor) -> Tensor:
        a, b = self.first
        return nn.functional.linear(nn.functional.linear(x, (a * self.e).to(x.dtype)), b.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        return base + self.act(x) * (ALPHA / RANK)


def _near_square(size: int) -> tuple[int, int]:
    a = next(a for a in range(int(size**0.5), 0, -1) if size % a == 0)
    return a, size // a


def floor(model: nn.Module, method: str) -> nn.Module:
    return at_each_linear(model, lambda base: Floor(base, method))


def ours(model: nn.Module, method: str) -> nn.Module:
    adapted: nn.Module = get_peft_model(model, load_method(method)(target_modules="all-linear", **OPTIONS[method]))
    return adapted


def theirs(model: nn.Module, method: str) -> nn.Module:
    adapted: nn.Module = peft.get_peft_model(model, THEIRS[method](target_modules="all-linear", **OPTIONS[method]))
    return adapted


WAYS: dict[str, Any] = {"ours": ours, "HF peft": theirs, "floor": floor}


def step(method: str, dtype: torch.dtype, repeats: int) -> str:
    ways = {name: partial(way, method=method) for name, way in WAYS.items()}
    return training_step(f"{method}, training step", ways, dtype, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", default=",".join(OPTIONS))
    arguments = parser.parse_args()
    for method in arguments.methods.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            print(step(method, dtype, arguments.repeats), end="\n\n")


if __name__ == "__main__":
    main()

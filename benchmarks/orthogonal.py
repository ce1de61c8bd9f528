"""OFT and BOFT beside Hugging Face PEFT and a hand-written floor: one training step.

    python -m benchmarks.orthogonal [--repeats 7] [--cases oft,oft-exact,boft,boft-4]

A floor is the least code for the same maths: the blocks are made from the parameters, and multiply slices of x one
factor after the other. HF's BOFT with four factors is left out: without its CUDA extension it drops to one.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.training_step import at_each_linear, training_step
from peft_core import get_peft_model, load_method

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("oft", {}),
    "oft-exact": ("oft", {"use_cayley_neumann": False}),
    "boft": ("boft", {}),
    "boft-4": ("boft", {"boft_n_butterfly_factor": 4}),
}
THEIRS: dict[str, Any] = {"oft": peft.OFTConfig, "boft": peft.BOFTConfig}


class OftFloor(nn.Module):
    """y = W (x R) + b with blocks of 32."""

    def __init__(self, base: nn.Linear, use_cayley_neumann: bool = True) -> None:
        super().__init__()
        self.base, self.series = base, use_cayley_neumann
        self.rows = nn.Parameter(torch.zeros(base.in_features // 32, 32 * 31 // 2))
        self.upper = torch.triu_indices(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        upper = self.rows.new_zeros(len(self.rows), 32, 32)
        upper[:, self.upper[0], self.upper[1]] = self.rows
        q, eye = upper - upper.mT, torch.eye(32)
        if self.series:
            squared = q @ q
            blocks = eye + 2 * q + 2 * squared + 2 * squared @ q + squared @ squared
        else:
            blocks = torch.linalg.solve(eye + q, eye - q, left=False)
        out: Tensor = self.base(_by_blocks(x, blocks))
        return out


class BoftFloor(nn.Module):
    """y = s ∘ (W (x R)) + b with blocks of 4."""

    def __init__(self, base: nn.Linear, boft_n_butterfly_factor: int = 1) -> None:
        super().__init__()
        self.base, n = base, base.in_features
        self.matrices = nn.Parameter(torch.zeros(boft_n_butterfly_factor, n // 4, 4, 4))
        self.scale = nn.Parameter(torch.ones(base.out_features))
        self.order = []
        for low in (2**i for i in range(boft_n_butterfly_factor)):
            order = torch.arange(n).view(-1, 2, low, 2).transpose(1, 2).flatten()
            self.order.append((order, order.argsort()))

    def forward(self, x: Tensor) -> Tensor:
        q, eye = (self.matrices - self.matrices.mT) / 2, torch.eye(4)
        factors = torch.linalg.solve(eye + q, eye - q, left=False)
        for blocks, (order, back) in reversed(list(zip(factors, self.order, strict=True))):
            x = _by_blocks(x[..., order], blocks)[..., back] if len(factors) > 1 else _by_blocks(x, blocks)
        out = nn.functional.linear(x, self.base.weight) * self.scale.to(x.dtype)
        return out if self.base.bias is None else out + self.base.bias


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    k, b, _ = blocks.shape
    return torch.einsum("...kb,kbc->...kc", x.view(*x.shape[:-1], k, b), blocks.to(x.dtype)).reshape(x.shape)


def floor(model: nn.Module, method: str, options: dict[str, Any]) -> nn.Module:
    kind: Any = {"oft": OftFloor, "boft": BoftFloor}[method]
    return at_each_linear(model, partial(kind, **options))


def ours(model: nn.Module, method: str, options: dict[str, Any]) -> nn.Module:
    adapted: nn.Module = get_peft_model(model, load_method(method)(target_modules="all-linear", **options))
    return adapted


def theirs(model: nn.Module, method: str, options: dict[str, Any]) -> nn.Module:
    adapted: nn.Module = peft.get_peft_model(model, THEIRS[method](target_modules="all-linear", **options))
    return adapted


def step(case: str, dtype: torch.dtype, repeats: int) -> str:
    method, options = CASES[case]
    ways: dict[str, Any] = {"ours": ours, "HF peft": theirs, "floor": floor}
    if case == "boft-4":
        del ways["HF peft"]
    ways = {name: partial(way, method=method, options=options) for name, way in ways.items()}
    return training_step(f"{case}, training step", ways, dtype, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES))
    arguments = parser.parse_args()
    for case in arguments.cases.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            print(step(case, dtype, arguments.repeats), end="\n\n")


if __name__ == "__main__":
    main()

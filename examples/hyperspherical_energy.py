"""The picture in peft-orthogonal's README: what training does to the hyperspherical energy of a layer's neurons.

    python -m examples.hyperspherical_energy [--output docs/images/hyperspherical-energy.png]

The energy, Σ 1 / ‖wᵢ - wⱼ‖ over pairs of neurons scaled to length 1 (Qiu et al. 2023, https://arxiv.org/abs/2306.07280,
equation 2), tells how evenly the neurons point. One layer is taught another one's outputs by each method.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import get_peft_model
from peft_core.config import TargetedConfig
from peft_lora import LoraConfig
from peft_orthogonal import BOFTConfig, OFTConfig

matplotlib.use("Agg")
from matplotlib import pyplot

LAYER: dict[str, Any] = {"target_modules": ["0"]}
METHODS: dict[str, TargetedConfig | None] = {
    "full fine-tuning": None,
    "LoRA, r=8": LoraConfig(r=8, lora_alpha=16, **LAYER),
    "OFT, exact, blocks of 16": OFTConfig(oft_block_size=16, use_cayley_neumann=False, **LAYER),
    "BOFT, 4 factors of 8": BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=4, **LAYER),
}


def energy(weight: Tensor) -> float:
    """Hyperspherical energy of the rows of a weight."""
    return float((1 / torch.pdist(F.normalize(weight.double(), dim=1))).sum())


def energies(config: TargetedConfig | None, steps: int) -> list[float]:
    """The energy, relative to that at the start, before each step of training and at the end."""
    torch.manual_seed(0)
    layer, other, x = nn.Linear(64, 48), nn.Linear(64, 48), torch.randn(256, 64)
    model: Any = nn.Sequential(layer)
    if config is not None:
        model = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    with torch.no_grad():
        target = other(x)
    for _ in range(steps + 1):
        weight = layer.weight
        if config is not None:
            model.merge_adapter()
            weight = layer.weight
            model.unmerge_adapter()
        found.append(energy(weight.detach()))
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value / found[0] for value in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images/hyperspherical-energy.png"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7, 3), dpi=90, layout="constrained")
    for (name, config), style in zip(METHODS.items(), ("-", "-", "-", "--"), strict=True):
        values = energies(config, options.steps)
        print(f"{name:28}largest change of the energy: {max(abs(value - 1) for value in values):.1e}")
        axes.plot(values, style, label=name)
    axes.set(xlabel="step", ylabel="energy / energy before")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output)


if __name__ == "__main__":
    main()

"""A small vision transformer learns the digits 0 to 4, then 5 to 9 from a hundred pictures, by BOFT, OFT and LoRA.

    python -m examples.transfer_digits

Prints the accuracy on the other pictures of 5 to 9, and how far each method moved the cosines of the angles between the
backbone's neurons: rotations leave them where they are. `--quick` trains a few steps, which shows that it runs and
nothing else.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from peft_core import get_peft_model
from peft_core.config import TargetedConfig
from peft_lora import LoraConfig
from peft_orthogonal import BOFTConfig, OFTConfig

SHOTS = 20  # pictures of each new digit
ADAPTED: dict[str, Any] = {
    "target_modules": r"vit\.layers\..*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
    "modules_to_save": ["classifier"],
}
METHODS: dict[str, TargetedConfig | None] = {
    "head alone": None,
    "LoRA r=4": LoraConfig(r=4, lora_alpha=8, **ADAPTED),
    "OFT, blocks of 8": OFTConfig(oft_block_size=8, use_cayley_neumann=False, **ADAPTED),
    "BOFT, 1 factor of 4": BOFTConfig(boft_block_size=4, **ADAPTED),
    "BOFT, 4 factors of 4": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=4, **ADAPTED),
}


@dataclass(frozen=True)
class Pictures:
    """Images (number, 1, 8, 8), from 0 to 1, and which of five digits each shows, (number,)."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> Pictures:
        return Pictures(self.images[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def digits(first: int) -> Pictures:
    """All pictures of the five digits from `first` on, shuffled."""
    data = load_digits()
    images, labels = torch.tensor(data.images).float().unsqueeze(1) / 16, torch.tensor(data.target)
    chosen = ((labels >= first) & (labels < first + 5)).nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    return Pictures(images[chosen], labels[chosen] - first)


def few(pictures: Pictures, shots: int) -> tuple[Pictures, Pictures]:
    """`shots` of each digit, and the others."""
    rows = torch.cat([(pictures.labels == digit).nonzero().flatten()[:shots] for digit in range(5)])
    others = torch.ones(len(pictures), dtype=torch.bool)
    others[rows] = False
    return pictures[rows], pictures[others.nonzero().flatten()]


def transformer() -> Any:
    """About 100 thousand parameters: 4 × 4 patches, three blocks of width 64."""
    sizes: dict[str, Any] = {
        "num_labels": 5,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, **sizes))


def train(model: Any, pictures: Pictures, steps: int, lr: float) -> None:
    """AdamW over everything that trains, batches of 50 drawn anew each step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = pictures[torch.randperm(len(pictures), generator=generator)[:50]]
        model(pixel_values=batch.images, labels=batch.labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, pictures: Pictures) -> float:
    """Share of pictures told right."""
    return float((model(pixel_values=pictures.images).logits.argmax(-1) == pictures.labels).float().mean())


@torch.no_grad()
def angles(model: Any) -> Tensor:
    """Cosines between the neurons of each linear layer of the backbone, all of them in one vector."""
    layers = [m for m in model.vit.layers.modules() if isinstance(m, nn.Linear)]
    return torch.cat([(F.normalize(m.weight) @ F.normalize(m.weight).T).flatten() for m in layers])


def transfer(base: Any, config: TargetedConfig | None, few_new: Pictures, steps: int) -> tuple[Any, int]:
    """The base with a new head, taught five new digits by one method; and how many parameters that trained."""
    model = copy.deepcopy(base)
    torch.manual_seed(2)
    model.classifier.reset_parameters()
    if config is None:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    else:
        model = get_peft_model(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(model, few_new, steps, 1e-2)
    return model, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args().quick
    base, old = transformer(), digits(0)
    held_out = torch.arange(len(old)) >= 700
    train(base, old[(~held_out).nonzero().flatten()], 5 if quick else 400, 3e-3)
    print(
        f"{sum(p.numel() for p in base.parameters()):,} parameters, trained on 0 to 4: "
        f"accuracy {accuracy(base, old[held_out.nonzero().flatten()]):.3f}\n"
    )
    few_new, unseen = few(digits(5), SHOTS)
    before = angles(base)
    print(
        f"{f'5 to 9, from {len(few_new)} pictures':28}{'trained':>10}{'accuracy':>10}{'angles moved':>14}{'CPU-s':>8}"
    )
    for name, config in METHODS.items():
        started = time.process_time()
        model, trained = transfer(base, config, few_new, 5 if quick else 150)
        found, seconds = accuracy(model, unseen), time.process_time() - started
        plain = model if config is None else model.merge_and_unload()
        moved = float((angles(plain) - before).abs().max())
        print(f"{name:28}{trained:10,}{found:10.3f}{moved:14.1e}{seconds:8.1f}")


if __name__ == "__main__":
    main()

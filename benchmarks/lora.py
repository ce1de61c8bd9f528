"""LoRA beside Hugging Face PEFT and a hand-written floor: a training step, and putting the adapters in.

    hatch run bench [--repeats 7]

The floor is the least code that computes the same: a module that adds two products to a frozen linear layer's output.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import kept_for_backward, operations, table, times
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
    """Put the floor at every linear layer but the head."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, Floor(child))
    return model


def ours(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def theirs(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


WAYS: dict[str, Any] = {"ours": ours, "HF peft": theirs, "floor": floor}


def llama(hidden: int, inner: int, layers: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype)


def step(dtype: torch.dtype, repeats: int) -> str:
    """Forward and backward of a batch, 14 linear layers adapted; `base` is the frozen model to its inputs."""
    plain = llama(512, 1376, 2, dtype)
    x = torch.randn(4, 256, 512, dtype=dtype)
    models = {name: way(copy.deepcopy(plain)) for name, way in WAYS.items()}
    models["base"] = plain.requires_grad_(False)

    def forward(model: nn.Module) -> Tensor:
        inputs: Tensor = x.detach().requires_grad_(True)
        output: Tensor = model(inputs_embeds=inputs).logits
        return output

    def backward(model: nn.Module) -> None:
        forward(model).sum().backward()

    seconds = times({name: partial(backward, model) for name, model in models.items()}, repeats)
    sites = sum(isinstance(m, nn.Linear) for m in plain.modules()) - 1
    base_operations, base_bytes = operations(partial(forward, plain)), kept_for_backward(partial(forward, plain))
    rows = []
    for name, model in models.items():
        extra = (operations(partial(forward, model)) - base_operations) / sites
        kept = (kept_for_backward(partial(forward, model)) - base_bytes) / sites / 1024
        rows.append([name, f"{seconds[name] / seconds['base']:.2f}", f"{extra:.1f}", f"{kept:.0f}"])
    title = f"Training step, {str(dtype).removeprefix('torch.')}"
    return table(title, ["", "time / base", "extra operations per layer", "extra KiB kept per layer"], rows)


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

"""What the benchmarks of a training step have in common: the model, the floor's places, and the table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import kept_for_backward, operations, table, times


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


def at_each_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Freeze the model, and put what `make` makes of it in the place of every linear layer but the head."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, make(child))
    return model


def training_step(name: str, ways: Mapping[str, Callable[[nn.Module], Any]], dtype: torch.dtype, repeats: int) -> str:
    """Forward and backward of a batch, 14 linear layers adapted in several ways; `base` is frozen, to its inputs."""
    plain = llama(512, 1376, 2, dtype)
    x = torch.randn(4, 256, 512, dtype=dtype)
    models = {way: adapt(copy.deepcopy(plain)).train() for way, adapt in ways.items()}
    models["base"] = plain.requires_grad_(False)

    def forward(model: nn.Module) -> Tensor:
        inputs: Tensor = x.detach().requires_grad_(True)
        output: Tensor = model(inputs_embeds=inputs).logits
        return output

    def backward(model: nn.Module) -> None:
        forward(model).sum().backward()

    seconds = times({way: partial(backward, model) for way, model in models.items()}, repeats)
    sites = sum(isinstance(m, nn.Linear) for m in plain.modules()) - 1
    base_operations, base_bytes = operations(partial(forward, plain)), kept_for_backward(partial(forward, plain), plain)
    rows = []
    for way, model in models.items():
        extra = (operations(partial(forward, model)) - base_operations) / sites
        kept = (kept_for_backward(partial(forward, model), model) - base_bytes) / sites / 1024
        rows.append([way, f"{seconds[way] / seconds['base']:.2f}", f"{extra:.1f}", f"{kept:.0f}"])
    title = f"{name}, {str(dtype).removeprefix('torch.')}"
    return table(title, ["", "time / base", "extra operations per layer", "extra KiB kept per layer"], rows)

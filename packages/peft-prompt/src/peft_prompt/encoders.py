"""Networks that make prompts, kept beside what they make.

A file has the prompt under `prompt_embeddings`, which is all that Hugging Face's files have and all that inference
needs, and the network under `prompt_encoder.`, which its readers pass over. With the network an adapter can go on
training; without it, it computes the same and cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_core.config import AdapterConfig
from peft_core.errors import CheckpointError
from peft_core.layers import BaseLayer

NETWORK = "prompt_encoder."
TABLE = "prompt_embeddings"


class Made(nn.Module):
    """A prompt (rows, columns): a network's output, or a constant, which is what a file has.

    `network` is None where a file had none. `fixed` says that the prompt is only used: it is then not computed anew at
    each call, and nothing of it trains.
    """

    def __init__(self, layer: BaseLayer, shape: tuple[int, int], network: nn.Module | None, fixed: bool) -> None:
        super().__init__()
        self.shape = shape
        self.prompt_encoder = network
        self.constant: Tensor | None
        kept = torch.empty(shape, device=layer.device, dtype=layer.dtype) if fixed or network is None else None
        self.register_buffer("constant", kept)
        if network is not None and fixed:
            network.requires_grad_(False)

    @property
    def whole(self) -> Tensor:
        """All of it, as a file has it: without dropout."""
        if self.constant is not None:
            return self.constant
        network: Any = self.prompt_encoder
        like = next(network.parameters())
        if like.is_meta:
            return torch.empty(self.shape, device="meta", dtype=like.dtype)
        with torch.no_grad():
            made: Tensor = network.whole()
        return made

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        """Slot -> (owner, attribute) of what is saved."""
        found: dict[str, tuple[nn.Module, str]] = {TABLE: (self, "whole")}
        for prefix, module in self.prompt_encoder.named_modules() if self.prompt_encoder is not None else ():
            dot = f"{prefix}." if prefix else ""
            found.update({f"{NETWORK}{dot}{name}": (module, name) for name in module._parameters})
        return found

    def parts(self, slot: str, value: Tensor) -> list[tuple[nn.Module, str, Tensor]]:
        """Where a slot's value is kept. The prompt itself is nowhere, where a network makes it at each call."""
        if slot == TABLE:
            return [] if self.constant is None else [(self, "constant", value)]
        owner, name = self.slots()[slot]
        return [(owner, name, value)]


def has_network(config: AdapterConfig, tensors: Mapping[str, Tensor] | None, what: str) -> bool:
    """Whether a network is to be built. `tensors` are those of a file, by slot; None for a new adapter.

    Raises `CheckpointError` where an adapter is to be trained whose file does not hold the network.
    """
    if tensors is None or any(name.startswith(NETWORK) for name in tensors):
        return True
    if not config.inference_mode:
        raise CheckpointError(
            f"the file holds the prompt that a network made and not the network ({what}), as Hugging Face's files do. "
            "It can be used (is_trainable=False; inference_mode=True in a config of your own) but not trained further: "
            "train a new one, or load the checkpoint of whoever trained this with peft-prompt"
        )
    return False


def linear(layer: BaseLayer, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer where `layer` is, without values."""
    return nn.Linear(inputs, outputs, device="meta", dtype=layer.dtype).to_empty(device=layer.device)


def embedding(layer: BaseLayer, rows: int, width: int) -> nn.Embedding:
    """A table where `layer` is, without values."""
    return nn.Embedding(rows, width, device="meta", dtype=layer.dtype).to_empty(device=layer.device)


def reset(network: nn.Module) -> None:
    """Every layer's customary starting values."""
    for module in network.modules():
        if module is not network and hasattr(module, "reset_parameters"):
            start: Any = module.reset_parameters
            start()

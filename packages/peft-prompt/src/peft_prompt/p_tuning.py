"""P-tuning: virtual tokens that a small network makes.

Liu et al. 2021, "GPT Understands, Too", https://arxiv.org/abs/2103.10385, section 3: trainable h_1 ... h_n go through
a network f, and f(h_1) ... f(h_n) are put in front of the input. f is a bidirectional LSTM and an MLP with one hidden
layer, 2h -> 2h -> d, or (here and in later work) an MLP alone with two hidden layers, d -> h -> h -> d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.backbones import backbone_sites
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, SiteRequest
from peft_core.link import Link
from peft_core.prompts import EncoderMask, PromptAdapter

from .config import KEYS, PromptLearningConfig, pools_first, saved_heads, sizes, width_of_embeddings
from .encoders import Made, embedding, has_network, linear, reset


class PromptEncoderConfig(PromptLearningConfig):
    """The network: `encoder_reparameterization_type` "MLP" or "LSTM".

    `encoder_hidden_size` is h, by default d. `encoder_num_layers` and `encoder_dropout` (between the layers) are the
    LSTM's.
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = Field(None, ge=1)
    encoder_num_layers: int = Field(2, ge=1)
    encoder_dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _a_network(self) -> PromptEncoderConfig:
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            raise ValueError("encoder_reparameterization_type is 'MLP' or 'LSTM'")
        return self


@hookimpl
def peft_config() -> type[PromptEncoderConfig]:
    return PromptEncoderConfig


@hookimpl
def peft_resolve(config: PromptEncoderConfig, model: nn.Module) -> PromptEncoderConfig:
    """The sizes that were left open."""
    width = width_of_embeddings(config, model)
    open_ones = {"token_dim": width, "encoder_hidden_size": width, "num_transformer_submodules": 1}
    return config.resolve(**sizes(config, model, **open_ones))


@hookimpl
def peft_sites(config: PromptEncoderConfig, model: nn.Module) -> Sequence[SiteRequest]:
    """The backbone, or encoder and decoder; and the heads that are trained too."""
    sites = [SiteRequest(site.path, key_prefix=KEYS, meta=site.meta) for site in backbone_sites(model)]
    return [*sites, *saved_heads(config, model)]


@hookimpl
def peft_build(
    config: PromptEncoderConfig, layer: BaseLayer, model: nn.Module, tensors: Mapping[str, Tensor] | None
) -> Adapter:
    if layer.request.meta["role"] == "decoder":
        return EncoderMask(layer, config.n)
    return EncodedPrompt(layer, config, tensors, pools_first(model))


class EncodedPrompt(PromptAdapter):
    """The prompt (n · submodules, d), of which the first n rows are used, and the network that makes it."""

    def __init__(
        self,
        layer: BaseLayer,
        config: PromptEncoderConfig,
        tensors: Mapping[str, Tensor] | None = None,
        pooled: bool = False,
    ) -> None:
        super().__init__(layer)
        self.num_virtual_tokens = config.n
        self.keep_positions = pooled or layer.request.meta["role"] == "encoder"
        shape = (config.n * (config.num_transformer_submodules or 1), config.token_dim or 0)
        network = PromptNetwork(layer, config, *shape) if has_network(config, tensors, "P-tuning's encoder") else None
        self.made = Made(layer, shape, network, fixed=tensors is not None and config.inference_mode)

    def reset_parameters(self) -> None:
        reset(self.made)

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        return self.made.slots()

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        yield from self.made.parts(slot, value)

    def virtual_tokens(self, batch: int, base: Link) -> Tensor:
        network: Any = self.made.prompt_encoder
        prompt: Tensor = network(self.training) if self.made.constant is None else self.made.constant
        return prompt[: self.num_virtual_tokens]


class PromptNetwork(nn.Module):
    """h (rows, d) -> f(h) (rows, d)."""

    def __init__(self, layer: BaseLayer, config: PromptEncoderConfig, rows: int, width: int) -> None:
        super().__init__()
        hidden = config.encoder_hidden_size or width
        self.embedding = embedding(layer, rows, width)
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = Recurrent(layer, width, hidden, config.encoder_num_layers, config.encoder_dropout)
            parts = [linear(layer, 2 * hidden, 2 * hidden), nn.ReLU(), linear(layer, 2 * hidden, width)]
        else:
            parts = [linear(layer, width, hidden), nn.ReLU(), linear(layer, hidden, hidden), nn.ReLU()]
            parts.append(linear(layer, hidden, width))
        self.mlp_head = nn.Sequential(*parts)

    def forward(self, training: bool) -> Tensor:
        x = self.embedding.weight
        if hasattr(self, "lstm_head"):
            x = self.lstm_head(x, training)
        made: Tensor = self.mlp_head(x)
        return made

    def whole(self) -> Tensor:
        """The prompt without dropout."""
        made: Tensor = self(False)
        return made


class Recurrent(nn.Module):
    """A bidirectional LSTM, (length, d) -> (length, 2h), with `nn.LSTM`'s names of parameters.

    `nn.LSTM` keeps a list of its parameters of its own, which does not follow when a checkpoint takes their places.
    """

    def __init__(self, layer: BaseLayer, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.layers, self.dropout = hidden, layers, dropout
        form = nn.LSTM(width, hidden, layers, bidirectional=True, device="meta")
        for name, parameter in form.named_parameters():
            self.register_parameter(name, layer.parameter(*parameter.shape))

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(self.hidden), 1 / math.sqrt(self.hidden))

    def forward(self, x: Tensor, training: bool) -> Tensor:
        state = x.new_zeros(2 * self.layers, 1, self.hidden)
        weights: list[Tensor] = [*self.parameters()]
        dropout = self.dropout if self.layers > 1 else 0.0
        # Of (length, batch, features); the arguments are those of `nn.LSTM`'s kernel.
        out: Tensor = torch.lstm(
            x[:, None], (state, state), weights, True, self.layers, dropout, training, True, False
        )[0]
        return out[:, 0]

"""Prompt tuning: embeddings in front of the input, and nothing else, are trained.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", https://arxiv.org/abs/2104.08691,
section 2: with input embeddings X (length, d) and a prompt P (n, d), the model computes Pr(Y | [P; X]).

In encoder-decoder models the prompt is in front of the encoder's input, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.backbones import backbone_sites
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, SiteRequest
from peft_core.link import Link
from peft_core.prompts import EncoderMask, PromptAdapter

from .config import KEYS, pools_first, saved_heads, sizes, width_of_embeddings
from .starts import StartConfig, table


class PromptTuningConfig(StartConfig):
    """A table of `num_virtual_tokens` embeddings, and how it starts; see `StartConfig`.

    `num_transformer_submodules=2`, as Hugging Face's files of encoder-decoder models have it, gives the table a second
    half, which takes no part.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"


@hookimpl
def peft_config() -> type[PromptTuningConfig]:
    return PromptTuningConfig


@hookimpl
def peft_resolve(config: PromptTuningConfig, model: nn.Module) -> PromptTuningConfig:
    """The sizes that were left open."""
    return config.resolve(
        **sizes(config, model, token_dim=width_of_embeddings(config, model), num_transformer_submodules=1)
    )


@hookimpl
def peft_sites(config: PromptTuningConfig, model: nn.Module) -> Sequence[SiteRequest]:
    """The backbone, or encoder and decoder; and the heads that are trained too."""
    sites = [SiteRequest(site.path, key_prefix=KEYS, meta=site.meta) for site in backbone_sites(model)]
    return [*sites, *saved_heads(config, model)]


@hookimpl
def peft_prepare(shared: nn.Module, trusted: bool) -> None:
    """Keep in mind whose word the config is."""
    shared.__dict__["trusted"] = trusted


@hookimpl
def peft_build(config: PromptTuningConfig, layer: BaseLayer, model: nn.Module) -> Adapter:
    if layer.request.meta["role"] == "decoder":
        return EncoderMask(layer, config.n)
    return PromptTable(layer, config, pools_first(model))


class PromptTable(PromptAdapter):
    """The prompt: `prompt_embeddings` (n · submodules, d), of which the first n rows are used."""

    def __init__(self, layer: BaseLayer, config: PromptTuningConfig, pooled: bool = False) -> None:
        super().__init__(layer)
        self.config = config
        self.num_virtual_tokens = config.n
        self.keep_positions = pooled or layer.request.meta["role"] == "encoder"
        rows = config.n * (config.num_transformer_submodules or 1)
        self.prompt_embeddings = layer.parameter(rows, config.token_dim or 0)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            shape = tuple(self.prompt_embeddings.shape)
            self.prompt_embeddings.copy_(table(self.config, self, shape, self.shared.__dict__["trusted"]))

    def virtual_tokens(self, batch: int, base: Link) -> Tensor:
        return self.prompt_embeddings[: self.num_virtual_tokens]

"""Prefix tuning: keys and values in front of those of every attention module.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190,
section 4: positions 0 to n - 1 have trained activations P (n, layers · 2 · d) in every layer, of which attention sees
keys and values. With `prefix_projection` (section 4.3), P = MLP(P') with a smaller P' (n, d) and one hidden layer.

In encoder-decoder models the prefix is in the decoder's self attention, as in Hugging Face's library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peft_core.adapter import Adapter
from peft_core.backbones import prefix_sites
from peft_core.errors import TargetError
from peft_core.hookspecs import hookimpl
from peft_core.layers import BaseLayer, SiteRequest
from peft_core.link import Link
from peft_core.prefixes import PositionShift, PrefixAdapter

from .config import KEYS, PromptLearningConfig, is_encoder_decoder, saved_heads, sizes
from .encoders import Made, embedding, has_network, linear, reset


class PrefixTuningConfig(PromptLearningConfig):
    """How the prefixes are made.

    Fields:
        prefix_projection: by an MLP, d -> `encoder_hidden_size` -> layers · 2 · d, rather than trained themselves.
        encoder_hidden_size: by default d = key heads · head dimension.
        init_weights: "zero" starts from keys and values of 0; by default they are drawn.
        num_transformer_submodules: in encoder-decoder models 2, the form of Hugging Face's files, has its way of
            choosing a layer's part (see `part_of`); with 1 each layer of the decoder has a part of its own.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    encoder_hidden_size: int | None = Field(None, ge=1)
    prefix_projection: bool = False
    init_weights: str | None = None

    @model_validator(mode="after")
    def _known_start(self) -> PrefixTuningConfig:
        if self.init_weights not in (None, "zero"):
            raise ValueError("init_weights is 'zero', or left out")
        return self


def attentions(model: nn.Module) -> list[SiteRequest]:
    """The attention modules that get prefixes, in order.

    Raises `TargetError` where there are none, or their keys differ in size.
    """
    found = [s for s in prefix_sites(model) if s.meta["role"] == "attention"]
    if is_encoder_decoder(model):
        found = [site for site in found if not site.meta["encoder"]]
    shapes = {(site.meta["kv_heads"], site.meta["head_dim"]) for site in found}
    if len(shapes) != 1:
        raise TargetError(f"prefixes need attention modules with keys of one size; this model's are {sorted(shapes)}")
    return found


@hookimpl
def peft_config() -> type[PrefixTuningConfig]:
    return PrefixTuningConfig


@hookimpl
def peft_resolve(config: PrefixTuningConfig, model: nn.Module) -> PrefixTuningConfig:
    """The sizes that were left open: heads and width are those of the keys."""
    sites = attentions(model)
    heads, width = sites[0].meta["kv_heads"], sites[0].meta["head_dim"]
    resolved = config.resolve(
        **sizes(
            config,
            model,
            token_dim=heads * width,
            encoder_hidden_size=config.token_dim or heads * width,
            num_attention_heads=heads,
            num_layers=len(sites),
            num_transformer_submodules=2 if is_encoder_decoder(model) else 1,
        )
    )
    if resolved.num_layers != len(sites) or resolved.token_dim != heads * width:
        raise TargetError(
            f"the prefix is for {resolved.num_layers} layers of keys of {resolved.token_dim} numbers; this model has "
            f"{len(sites)} of {heads * width}"
        )
    return resolved


@hookimpl
def peft_sites(config: PrefixTuningConfig, model: nn.Module) -> Sequence[SiteRequest]:
    """The attention modules, the first of which keeps the tensors; where positions begin; heads that are trained."""
    chosen = attentions(model)
    sites = [
        SiteRequest(site.path, key_prefix=KEYS if not number else "", meta={**site.meta, "number": number})
        for number, site in enumerate(chosen)
    ]
    shifts = [site for site in prefix_sites(model) if site.meta["role"] == "positions"]
    if is_encoder_decoder(model):
        shifts = [site for site in shifts if not site.meta["encoder"]]
    return [*sites, *shifts, *saved_heads(config, model)]


@hookimpl
def peft_build(
    config: PrefixTuningConfig, layer: BaseLayer, shared: nn.Module, tensors: Mapping[str, Tensor] | None
) -> Adapter:
    if layer.request.meta["role"] == "positions":
        return PositionShift(layer, config.n)
    if layer.request.meta["number"]:
        return PrefixPart(layer, config, shared.__dict__.get("prefix"))  # none where the first one was refused
    whole = Whole(layer, config, tensors)
    shared.__dict__["prefix"] = whole
    return PrefixPart(layer, config, whole, keeps=True)


def part_of(config: PrefixTuningConfig, layer: int, kind: int) -> int:
    """Which of the layers · 2 parts of the table a layer's keys (`kind` 0) or values (1) are.

    Hugging Face's library, in encoder-decoder models, writes the parts twice in a row, for self and cross attention,
    and gives each layer the next four, of which the last two have no effect.
    """
    step = 4 if config.num_transformer_submodules == 2 else 2
    return (step * layer + kind) % (2 * (config.num_layers or 1))


class Whole(nn.Module):
    """All prefixes, (n, layers · 2 · d): the table itself, or an MLP's output."""

    def __init__(self, layer: BaseLayer, config: PrefixTuningConfig, tensors: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.width = config.token_dim or 0
        shape = (config.n, (config.num_layers or 0) * 2 * self.width)
        self.zero = config.init_weights == "zero"
        self.table: nn.Parameter | None = None
        self.made: Made | None = None
        if config.prefix_projection:
            network = has_network(config, tensors, "the projection of prefixes")
            mlp = Projection(layer, config, shape) if network else None
            self.made = Made(layer, shape, mlp, fixed=tensors is not None and config.inference_mode)
        else:
            self.table = layer.parameter(*shape)

    def reset_parameters(self) -> None:
        """Standard normal values, an MLP's own, or those that make every key and value 0."""
        if self.table is not None:
            nn.init.zeros_(self.table) if self.zero else nn.init.normal_(self.table)
        elif self.made is not None:
            reset(self.made)
            last: Any = self.made.prompt_encoder.transform[2] if self.zero else None  # type: ignore[union-attr, index]
            for parameter in last.parameters() if last is not None else ():
                nn.init.zeros_(parameter)

    def part(self, index: int) -> Tensor:
        """Part number `index`, (n, d)."""
        constant = self.table if self.made is None else self.made.constant
        if constant is not None:
            return constant[:, index * self.width : (index + 1) * self.width]
        network: Any = self.made.prompt_encoder  # type: ignore[union-attr]
        made: Tensor = network(index)
        return made


class Projection(nn.Module):
    """P' (n, d) -> tanh(P' W1 + b1) W2 + b2 (n, layers · 2 · d), part by part."""

    def __init__(self, layer: BaseLayer, config: PrefixTuningConfig, shape: tuple[int, int]) -> None:
        super().__init__()
        self.width = config.token_dim or 0
        hidden = config.encoder_hidden_size or self.width
        self.embedding = embedding(layer, shape[0], self.width)
        self.transform = nn.Sequential(linear(layer, self.width, hidden), nn.Tanh(), linear(layer, hidden, shape[1]))

    def forward(self, index: int) -> Tensor:
        rows = slice(index * self.width, (index + 1) * self.width)
        last: Any = self.transform[2]
        return F.linear(self.transform[:2](self.embedding.weight), last.weight[rows], last.bias[rows])

    def whole(self) -> Tensor:
        """All parts, computed as in a call."""
        last: Any = self.transform[2]
        return torch.cat([self(index) for index in range(len(last.bias) // self.width)], 1)


class PrefixPart(PrefixAdapter):
    """One attention module's keys and values. The first module's keeps the whole, which the others see."""

    def __init__(self, layer: BaseLayer, config: PrefixTuningConfig, whole: Whole | None, keeps: bool = False) -> None:
        super().__init__(layer)
        meta = layer.request.meta
        self.num_virtual_tokens = config.n
        self.heads, self.head_dim = meta["kv_heads"], meta["head_dim"]
        self.parts_of_whole = [part_of(config, meta["number"], kind) for kind in (0, 1)]
        self.kept: Whole | None = whole if keeps else None
        self.__dict__["whole"] = whole  # by reference: it is registered where it is kept

    def reset_parameters(self) -> None:
        if self.kept is not None:
            self.kept.reset_parameters()

    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        if self.kept is None:
            return {}
        return {"prompt_embeddings": (self.kept, "table")} if self.kept.made is None else self.kept.made.slots()

    def parts(self, slot: str, value: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        if self.kept is None or self.kept.made is None:
            yield from super().parts(slot, value)
        else:
            yield from self.kept.made.parts(slot, value)

    def key_values(self, batch: int, base: Link) -> tuple[Tensor, Tensor]:
        """Each (1, key heads, n, head dimension)."""
        whole: Whole = self.__dict__["whole"]
        keys, values = (
            whole.part(index).view(-1, self.heads, self.head_dim).transpose(0, 1)[None] for index in self.parts_of_whole
        )
        return keys, values

"""Methods of virtual tokens and of key/value prefixes, written against the public API alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_core import (
    AdapterConfig,
    EncoderMask,
    PositionShift,
    PrefixAdapter,
    PromptAdapter,
    SiteRequest,
    backbone_sites,
    hookimpl,
    prefix_sites,
    register_method,
    unregister_method,
)


class PromptConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOYPROMPT"
    n: int = 3
    std: float = 1.0


class Prompt(PromptAdapter):
    def __init__(self, layer: Any, config: PromptConfig) -> None:
        super().__init__(layer)
        self.num_virtual_tokens = config.n
        self.keep_positions = layer.request.meta.get("role") == "encoder"
        self.std = config.std
        self.prompt = layer.parameter(config.n, layer.module.get_input_embeddings().embedding_dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt, std=self.std)

    def virtual_tokens(self, batch: int, base: Any) -> Tensor:
        return self.prompt


class prompt:
    @staticmethod
    @hookimpl
    def peft_config() -> Any:
        return PromptConfig

    @staticmethod
    @hookimpl
    def peft_sites(model: nn.Module) -> Any:
        return backbone_sites(model)

    @staticmethod
    @hookimpl
    def peft_build(config: PromptConfig, layer: Any) -> Any:
        if layer.request.meta["role"] == "decoder":
            return EncoderMask(layer, config.n)
        return Prompt(layer, config)


class PrefixConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOYPREFIX"
    n: int = 3
    std: float = 1.0
    cross: bool = False
    by_hand: tuple[str, ...] = ()  # attention modules and a backbone, for models whose type nobody knows


class Prefix(PrefixAdapter):
    def __init__(self, layer: Any, config: PrefixConfig) -> None:
        super().__init__(layer)
        meta = layer.request.meta
        self.num_virtual_tokens = config.n
        self.cross = meta["cross"]
        self.std = config.std
        self.keys = layer.parameter(meta["kv_heads"], config.n, meta["head_dim"])
        self.values = layer.parameter(meta["kv_heads"], config.n, meta["head_dim"])

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keys, std=self.std)
        nn.init.normal_(self.values, std=self.std)

    def key_values(self, batch: int, base: Any) -> tuple[Tensor, Tensor]:
        return self.keys[None], self.values[None]


class prefix:
    @staticmethod
    @hookimpl
    def peft_config() -> Any:
        return PrefixConfig

    @staticmethod
    @hookimpl
    def peft_sites(config: PrefixConfig, model: nn.Module) -> Any:
        if not config.by_hand:
            return prefix_sites(model, cross=config.cross)
        meta = {"role": "attention", "kv_heads": 2, "head_dim": 4, "cross": config.cross}
        sites = [SiteRequest(path, meta=meta) for path in config.by_hand[:-1]]
        return [*sites, SiteRequest(config.by_hand[-1], part="positions", meta={"role": "positions"})]

    @staticmethod
    @hookimpl
    def peft_build(config: PrefixConfig, layer: Any) -> Any:
        if layer.request.meta["role"] == "positions":
            return PositionShift(layer, config.n)
        return Prefix(layer, config)


@contextmanager
def prompt_methods() -> Iterator[None]:
    """Register them for a while."""
    for plugin in (prompt(), prefix()):
        register_method(plugin, replace=True)
    try:
        yield
    finally:
        for config_class in (PromptConfig, PrefixConfig):
            unregister_method(config_class.peft_type.lower())

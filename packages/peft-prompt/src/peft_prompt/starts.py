"""Starting values of prompts: embeddings of a text, or of tokens drawn from the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from peft_core.config import Indices
from peft_core.errors import ConfigError
from peft_core.prompts import PromptAdapter

from .config import PromptLearningConfig


class StartConfig(PromptLearningConfig):
    """How a table of prompts starts.

    `prompt_tuning_init` is "RANDOM" (standard normal), "TEXT" (the embeddings of `prompt_tuning_init_text`, repeated
    or cut to the number of tokens) or "SAMPLE_VOCAB" (embeddings of tokens drawn at random). A text needs a tokenizer:
    `tokenizer_name_or_path` is its name, loaded by transformers with `tokenizer_kwargs` when the adapter is made, or
    the tokenizer itself, of which the config keeps the token ids (`prompt_tuning_init_ids`).
    """

    written_if_set = frozenset({"prompt_tuning_init_ids"})

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    prompt_tuning_init_ids: Indices | None = None

    def __init__(self, **data: Any) -> None:
        tokenizer = data.get("tokenizer_name_or_path")
        if callable(tokenizer):
            text = data.get("prompt_tuning_init_text")
            if isinstance(text, str) and text:
                data["prompt_tuning_init_ids"] = _ids(tokenizer, text)
            name = getattr(tokenizer, "name_or_path", None)
            data["tokenizer_name_or_path"] = name if isinstance(name, str) and name else None
        super().__init__(**data)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _a_text_needs_a_tokenizer(self) -> StartConfig:
        if self.prompt_tuning_init not in self.starts():
            raise ValueError(f"prompt_tuning_init is one of {', '.join(self.starts())}")
        if self.prompt_tuning_init != "TEXT":
            if self.tokenizer_kwargs:
                raise ValueError("tokenizer_kwargs are for prompt_tuning_init='TEXT', the only start with a tokenizer")
            return self
        if self.prompt_tuning_init_ids is None:
            if not self.prompt_tuning_init_text:
                raise ValueError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text")
            if not self.tokenizer_name_or_path:
                raise ValueError(
                    "prompt_tuning_init='TEXT' needs a tokenizer: tokenizer_name_or_path is its name, or the tokenizer"
                )
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ValueError("a config cannot ask for trust_remote_code; load the tokenizer yourself and give it here")
        return self

    def beside_tensors(self, *, inference_mode: bool | None = None) -> dict[str, Any]:
        """The config in an adapter's file, without token ids, which no other reader knows and none needs."""
        data = super().beside_tensors(inference_mode=inference_mode)
        if data.pop("prompt_tuning_init_ids", None) is not None and not self.tokenizer_name_or_path:
            data["prompt_tuning_init"] = "RANDOM"  # others refuse a text without the name of a tokenizer
        return data

    @classmethod
    def starts(cls) -> tuple[str, ...]:
        """What `prompt_tuning_init` may be."""
        return ("RANDOM", "TEXT", "SAMPLE_VOCAB")


def table(config: StartConfig, adapter: PromptAdapter, shape: tuple[int, ...], trusted: bool) -> Tensor:
    """Starting values of a table of `shape` (rows, d).

    `trusted` says that the user wrote the config: no tokenizer is loaded because a file names it. Raises `ConfigError`
    for a text without tokens.
    """
    start = config.prompt_tuning_init
    if start == "SAMPLE_VOCAB":
        return embedded(adapter, torch.randint(vocabulary(adapter), shape[:1]), shape)
    ids: Sequence[int] | None = config.prompt_tuning_init_ids
    if start == "TEXT" and (trusted or ids is not None):
        ids = load_ids(config) if ids is None else ids
        if not ids:
            raise ConfigError(
                f"prompt_tuning_init_text: the tokenizer makes no token of {config.prompt_tuning_init_text!r}"
            )
        if max(ids) >= vocabulary(adapter):
            raise ConfigError(
                f"prompt_tuning_init_text: the tokenizer gives the token {max(ids)}, and the model has "
                f"{vocabulary(adapter)}; use the model's own tokenizer"
            )
        return embedded(adapter, torch.tensor(ids).repeat(-(-shape[0] // len(ids)))[: shape[0]], shape)
    return torch.randn(shape)


def load_ids(config: StartConfig) -> list[int]:
    """The tokens of the text, by the tokenizer that the config names. Raises `ConfigError` where it is not found."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer_name_or_path: the tokenizer {config.tokenizer_name_or_path!r} cannot be loaded ({error}); give "
            "its directory, or the tokenizer itself"
        ) from error
    return _ids(tokenizer, config.prompt_tuning_init_text or "")


def _ids(tokenizer: Any, text: str) -> list[int]:
    made = tokenizer(text)
    return [int(token) for token in (made["input_ids"] if isinstance(made, Mapping) or hasattr(made, "keys") else made)]


def vocabulary(adapter: PromptAdapter) -> int:
    """How many tokens the backbone embeds."""
    backbone: Any = adapter.layer.module
    return int(backbone.get_input_embeddings().num_embeddings)


def embedded(adapter: PromptAdapter, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What the backbone's table has for some tokens, scaled as the backbone scales them."""
    weight = next(iter(adapter.layer.module.get_input_embeddings().parameters()))  # type: ignore[operator]
    return adapter.embed(ids.to(weight.device)[None])[0].detach().reshape(shape)

"""What the prompt methods' configs have in common, and what they take from a model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator
from torch import nn

from peft_core.backbones import backbone_sites
from peft_core.config import AdapterConfig, Names
from peft_core.errors import TargetError
from peft_core.layers import SiteRequest
from peft_core.targets import select

KEYS = "/"
"""Prefix of keys: the tensors of prompts have neither a prefix nor a path in files."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""Ends of the names of models whose task needs no telling."""


class PromptLearningConfig(AdapterConfig):
    """Sizes of a prompt. All but `num_virtual_tokens` come from the model where they are not given.

    Fields:
        num_virtual_tokens: n, the number of positions in front of the user's.
        token_dim: d, the size of an embedding; for prefixes that of all key heads together.
        num_transformer_submodules: 2 where encoder and decoder have rows of the table, else 1.
        num_layers, num_attention_heads: of the model; for prefixes the number of key heads.
        modules_to_save: modules trained in full beside the prompt. Heads of tasks are found by `task_type`.
    """

    num_virtual_tokens: int | None = Field(None, ge=1)
    token_dim: int | None = Field(None, ge=1)
    num_transformer_submodules: int | None = Field(None, ge=1, le=2)
    num_attention_heads: int | None = Field(None, ge=1)
    num_layers: int | None = Field(None, ge=1)
    modules_to_save: Names | None = None

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _module_names(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) and name for name in value):
            raise ValueError("give a list of names of modules")
        return tuple(dict.fromkeys(value)) or None  # other writers repeat the names of heads

    @property
    def n(self) -> int:
        """The number of virtual tokens. Raises `TargetError` where it was not given."""
        if self.num_virtual_tokens is None:
            raise TargetError("num_virtual_tokens is not given; say how many virtual tokens there are to be (20, say)")
        return self.num_virtual_tokens


def sizes(config: PromptLearningConfig, model: nn.Module, **found: Any) -> dict[str, Any]:
    """The fields that were left open, from the model, `found` first.

    Raises `TargetError` for modules to save that the model does not have.
    """
    heads = select(model, config, other_sites=True)
    if heads.problems:
        raise TargetError("; ".join(heads.problems))
    own: Any = getattr(model, "config", None)
    own = own.get_text_config() if hasattr(own, "get_text_config") else own
    found.setdefault("num_layers", getattr(own, "num_hidden_layers", None))
    found.setdefault("num_attention_heads", getattr(own, "num_attention_heads", None))
    found.setdefault("task_type", task_of(model))
    given = {name: getattr(config, name) for name in found}
    _ = config.n
    return {**heads.resolved, **{name: found[name] for name, value in given.items() if value is None}}


def task_of(model: nn.Module) -> str | None:
    """The task of a language model, by the name of its class; None for others, whose heads would be trained too."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((task for end, task in TASKS.items() if any(name.endswith(end) for name in names)), None)


def saved_heads(config: PromptLearningConfig, model: nn.Module) -> list[SiteRequest]:
    """Copies of the modules that are trained in full, under the keys that files of prompts have for them."""
    paths = select(model, config, other_sites=True).modules_to_save
    return [SiteRequest(path, copied=True, key_prefix=f"{KEYS}base_model.{path}.") for path in paths]


def width_of_embeddings(config: PromptLearningConfig, model: nn.Module) -> int:
    """d of the embeddings that a backbone takes.

    Raises `TargetError` where it cannot embed its input, or the config says another d.
    """
    path = backbone_sites(model)[0].path
    backbone: Any = model.get_submodule(path)
    if not hasattr(backbone, "get_input_embeddings"):
        raise TargetError(f"{path or 'the model'}: the backbone has no get_input_embeddings, so its width is not known")
    width = int(backbone.get_input_embeddings().embedding_dim)
    if config.token_dim not in (None, width):
        raise TargetError(f"token_dim is {config.token_dim}, and the model's embeddings have {width} numbers")
    return width


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder beside its decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def pools_first(model: nn.Module) -> bool:
    """Whether a model classifies a sequence by what an encoder makes of its first position.

    That position is then the first virtual token's, as in Hugging Face's files. Decoders classify by the last position
    and call their head `score`.
    """
    classifies = any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)
    return classifies and not is_encoder_decoder(model) and not hasattr(model, "score")

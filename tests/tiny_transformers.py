"""Tiny seeded models of transformers' own classes, inputs for them, and adapters with values that matter."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from peft_core import get_peft_model, load_method

VOCABULARY, WIDTH = 32, 16
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"], "bert": ["query", "value"]}


CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 24}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**LAYERS, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
    | {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    # The fused kernels differ in the last bit, and which one runs depends on whether biases train.
    | {"attn_implementation": "eager"},
    "bert": {**LAYERS, "max_position_embeddings": 64, "num_labels": 3}
    | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def fresh(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A model as its class makes it, its dropout off unless `fields` say otherwise."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[kind]
    return model_class(config_class(**{"vocab_size": VOCABULARY, **SETTINGS[kind], **fields}))


def make(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A model in eval mode that tells tokens apart."""
    model = fresh(kind, seed, **fields)
    with torch.no_grad():  # the customary deviation of 0.02 leaves every token about as likely as the others
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8 if kind != "t5" else 2)
    return model.eval()


def batch(kind: str, rows: int = 4, length: int = 5) -> dict[str, Tensor]:
    """Arguments of `forward`; from the second row on, the left is padded."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row % (length - 1)] = 0
    ids = ids * mask
    given = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        given["decoder_input_ids"] = ids.flip(1)
    return given


def lora(kind: str, **fields: Any) -> Any:
    return load_method("lora")(**{"r": 4, "target_modules": TARGETS[kind], **fields})


def ia3(**fields: Any) -> Any:
    return load_method("ia3")(**fields)


def randomise(model: Any, name: str = "default", seed: int = 1, std: float = 0.3) -> Any:
    """Values that change the output, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft.adapters[name].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std)
    return model


def adapted(kind: str, *, both: bool = False, dtype: torch.dtype | None = None, **fields: Any) -> Any:
    """A model with a LoRA, "a"; with `both`, also an IA3, "b", both active and trainable."""
    model = make(kind, **fields)
    if dtype is not None:
        model.to(dtype)
    get_peft_model(model, lora(kind), "a")
    randomise(model, "a", seed=1)
    if both:
        model.add_adapter("b", ia3())
        randomise(model, "b", seed=2)
        model.set_adapter(["a", "b"])
    return model


def scores(model: Any, given: dict[str, Tensor], **others: Any) -> Tensor:
    return model(**given, **others).logits


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

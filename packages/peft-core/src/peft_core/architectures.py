"""What the parts of known model types are called: one table of roles, from which all methods take defaults.

A role names a function in a transformer: `query`, `key`, `value` (or `qkv`, where one layer computes them
all), `output` (of the attention), `gate`, `up` and `down` (of the feed-forward network), `attention` (the
block whose children these are), `blocks` (the list of layers), `embedding`, `head`. Its value are names of
modules, in the sense of `target_modules`. `within` is a regular expression that the paths of the roles'
modules begin with, for models in which the same names occur elsewhere too.

Extensions add model types with the hook `peft_architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import ConfigError

Roles = Mapping[str, tuple[str, ...]]

# A role that another one stands in for, where a model fuses several layers into one.
FUSED: Mapping[str, str] = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "gate_up", "up": "gate_up"}


def _roles(**roles: str) -> dict[str, tuple[str, ...]]:
    return {role: tuple(names.split()) for role, names in roles.items()}


_SEPARATE = _roles(query="q_proj", key="k_proj", value="v_proj")
_DECODER = _roles(attention="self_attn", blocks="layers", embedding="embed_tokens", head="lm_head")
# Llama and the many that follow it.
_LLAMA = _DECODER | _SEPARATE | _roles(output="o_proj", gate="gate_proj", up="up_proj", down="down_proj")
# Mixtures of experts, stacked in single parameters: their feed-forward networks have no modules.
_EXPERTS = _DECODER | _SEPARATE | _roles(output="o_proj")
# The original Transformer's encoder and decoder, in fairseq's names.
_FAIRSEQ = (
    _SEPARATE
    | _roles(attention="self_attn encoder_attn", output="out_proj", up="fc1", down="fc2", blocks="layers")
    | _roles(embedding="shared embed_tokens", head="lm_head")
)
_BERT_BODY = _roles(
    attention="attention", blocks="layer", output="attention.output.dense", up="intermediate.dense"
) | _roles(down="output.dense", dense="dense", embedding="word_embeddings")
_BERT = _BERT_BODY | _roles(query="query", key="key", value="value")
_BLOOM = _roles(attention="self_attention", blocks="h", qkv="query_key_value", output="self_attention.dense") | _roles(
    up="dense_h_to_4h", down="dense_4h_to_h", embedding="word_embeddings", head="lm_head"
)
_GPT2 = _roles(attention="attn", blocks="h", embedding="wte", head="lm_head", qkv="c_attn") | _roles(
    output="attn.c_proj", up="c_fc", down="mlp.c_proj"
)
_T5 = _roles(
    attention="SelfAttention EncDecAttention",
    blocks="block",
    query="q",
    key="k",
    value="v",
    output="o",
    down="wo",
) | _roles(embedding="shared", head="lm_head")

ARCHITECTURES: Mapping[str, Roles] = {
    # Decoders.
    **dict.fromkeys(
        (
            "cohere",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3_text",
            "granite",
            "helium",
            "llama",
            "llama4",
            "mistral",
            "olmo",
            "olmo2",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "seed_oss",
            "smollm3",
            "stablelm",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("gpt_oss", "qwen3_moe"), _EXPERTS),
    # The vision and audio towers use the same names.
    "gemma4": _LLAMA | _roles(within=r".*language_model\..*"),
    # `w1` to `w3` are the experts' layers in releases of transformers before 5.
    "mixtral": _EXPERTS | _roles(gate="w1", up="w3", down="w2"),
    "phi": _DECODER | _SEPARATE | _roles(output="dense", up="fc1", down="fc2"),
    "phi3": _DECODER | _roles(qkv="qkv_proj", output="o_proj", gate_up="gate_up_proj", down="down_proj"),
    **dict.fromkeys(
        ("glm", "glm4"),
        _DECODER | _SEPARATE | _roles(output="o_proj", gate_up="gate_up_proj", down="down_proj"),
    ),
    "starcoder2": _DECODER | _SEPARATE | _roles(output="o_proj", up="c_fc", down="c_proj"),
    "opt": _FAIRSEQ | _roles(attention="self_attn", embedding="embed_tokens"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gpt_neo": _roles(attention="attn", blocks="h", embedding="wte", head="lm_head")
    | _SEPARATE
    | _roles(output="out_proj", up="c_fc", down="c_proj"),
    "gptj": _roles(attention="attn", blocks="h", embedding="wte", head="lm_head")
    | _SEPARATE
    | _roles(output="out_proj", up="fc_in", down="fc_out"),
    "codegen": _roles(attention="attn", blocks="h", embedding="wte", head="lm_head", qkv="qkv_proj")
    | _roles(output="out_proj", up="fc_in", down="fc_out"),
    "gpt_neox": _BLOOM
    | _roles(attention="attention", blocks="layers", embedding="embed_in", head="lm_head")
    | _roles(output="attention.dense"),
    "bloom": _BLOOM | _roles(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    # RefinedWeb: the names of falcon's models before it was part of transformers.
    **dict.fromkeys(("falcon", "RefinedWeb", "RefinedWebModel"), _BLOOM),
    "mpt": _roles(attention="attn", blocks="blocks", embedding="wte", head="lm_head", qkv="Wqkv")
    | _roles(output="out_proj", up="up_proj", down="down_proj"),
    # `c_proj` ends both the attention and the feed-forward network.
    "btlm": _GPT2 | _roles(output="c_proj"),
    "chatglm": _roles(attention="self_attention", blocks="layers", embedding="word_embeddings")
    | _roles(qkv="query_key_value", output="self_attention.dense", up="dense_h_to_4h", down="dense_4h_to_h"),
    # Recurrent and hybrid models. In rwkv, `key`, `value` and `receptance` are in both halves of a block.
    "nemotron_h": _SEPARATE
    | _roles(attention="mixer", blocks="layers", embedding="embeddings", head="lm_head", output="o_proj")
    | _roles(up="up_proj", down="down_proj"),
    "rwkv": _roles(attention="attention", blocks="blocks", embedding="embeddings", head="head")
    | _roles(receptance="receptance", key="key", value="value", output="output"),
    "rwkv7": _roles(attention="attn", blocks="layers", embedding="embeddings", head="lm_head")
    | _roles(receptance="r_proj", key="k_proj", value="v_proj", output="o_proj", up="key", down="value"),
    # Encoders.
    **dict.fromkeys(("bert", "camembert", "electra", "layoutlm", "roberta", "xlm-roberta"), _BERT),
    "deberta": _BERT_BODY | _roles(qkv="in_proj"),
    "deberta-v2": _BERT_BODY | _roles(query="query_proj", key="key_proj", value="value_proj"),
    "distilbert": _roles(attention="attention", blocks="layer", embedding="word_embeddings")
    | _roles(query="q_lin", key="k_lin", value="v_lin", output="out_lin", up="lin1", down="lin2"),
    "modernbert": _roles(attention="attn", blocks="layers", embedding="tok_embeddings", qkv="Wqkv")
    | _roles(output="attn.Wo", gate_up="Wi", down="mlp.Wo"),
    "vit": _SEPARATE | _roles(attention="attention", blocks="layers", output="o_proj", up="fc1", down="fc2"),
    # Encoders with decoders.
    **dict.fromkeys(("bart", "blenderbot", "marian", "mbart", "pegasus"), _FAIRSEQ),
    "whisper": _FAIRSEQ | _roles(embedding="embed_tokens", head="proj_out"),
    "t5": _T5 | _roles(up="wi"),
    "mt5": _T5 | _roles(gate="wi_0", up="wi_1"),
    # The language model is T5 or OPT.
    "blip-2": _roles(query="q q_proj", key="k k_proj", value="v v_proj"),
}


def architecture(model_type: str) -> Roles | None:
    """The roles of a model type, built in or of an installed extension; None if nobody knows it.

    Raises `ConfigError` where an extension repeats a model type, `MethodError` where one cannot be loaded.
    """
    found = _extended().get(model_type)
    return ARCHITECTURES.get(model_type) if found is None else found


def _extended() -> dict[str, Roles]:
    """The model types of all extensions. Asked anew each time: extensions may come and go."""
    from .extensions import extensions
    from .hook_results import check_result

    owners = dict.fromkeys(ARCHITECTURES, "peft-core")
    table: dict[str, Roles] = {}
    extensions.load()
    for label, hook in extensions.one_by_one("peft_architectures"):
        for types in check_result("peft_architectures", hook(), label):
            for model_type, roles in types.items():
                if model_type in owners:
                    raise ConfigError(
                        f"the architecture of {model_type!r} is given twice, by {owners[model_type]} and by "
                        f"{label}; which one holds must not depend on their order. Uninstall or disable one."
                    )
                owners[model_type] = label
                table[model_type] = {role: tuple(names) for role, names in roles.items()}
    return table


def role_names(model_type: str | None, roles: Sequence[str]) -> str | tuple[str, ...] | None:
    """The modules that play `roles` in a model type, in the form of `target_modules`.

    A fused layer stands in for the parts it computes. None if the type, or one of the roles, is unknown.
    """
    table = architecture(model_type) if model_type else None
    if table is None:
        return None
    names: dict[str, None] = {}
    for role in roles:
        found = table.get(role) or table.get(FUSED.get(role, ""))
        if not found:
            return None
        names.update(dict.fromkeys(found))
    if (within := table.get("within")) and names:
        return rf"{'|'.join(within)}\.({'|'.join(re.escape(name) for name in names)})"
    return tuple(names)


def default_targets(config_class: type[Any], model_type: str | None) -> str | tuple[str, ...] | None:
    """What `target_modules` is for a model type when it is not given; None if there is no default.

    The class says which roles: `default_roles`, or its exceptions in `default_roles_for`.
    """
    roles: Iterable[str] = getattr(config_class, "default_roles_for", {}).get(
        model_type, getattr(config_class, "default_roles", ())
    )
    return role_names(model_type, tuple(roles)) or None


def model_type_of(model: nn.Module) -> str | None:
    """`model.config.model_type`, for configs that are objects or mappings."""
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return found if isinstance(found, str) and found else None

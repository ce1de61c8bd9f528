"""What the parts of known model types are called: one table of roles, from which all methods take defaults.

A role names a function in a transformer: `query`, `key`, `value` (or `qkv`, where one layer computes them
all), `output` (of the attention), `gate`, `up` and `down` (of the feed-forward network), `attention` (the
block whose children these are), `blocks` (the list of layers), `embedding`, `head`. Its value are names of
modules, in the sense of `target_modules`. `within` is a regular expression that the paths of the roles'
modules begin with, for models in which the same names occur elsewhere too.

A block's sub-layers, `attention`, `cross` (the attention of a decoder over an encoder's output) and
`feed_forward`, each add their output h to the residual stream x, with a norm at one place or another:

    attention_norm, cross_norm, feed_forward_norm                  x + f(norm(x))
    attention_branch_norm, feed_forward_branch_norm                x + norm(f(x))
    attention_add_norm, cross_add_norm, feed_forward_add_norm      norm(x + f(x))

`cross_output` is the `output` of cross attention, and `feed_forward` the module of the feed-forward network where
it has no `down` of its own (a mixture of experts). A model type has the roles whose place was verified.

Extensions add model types with the hook `peft_architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import ConfigError, TargetError, add_note
from .patterns import NameMatcher
from .suggest import did_you_mean
from .tree import base_modules, walk

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

_LAYERS: Mapping[str, Roles] = {
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


_LLAMA_NORMS = _roles(attention_norm="input_layernorm", feed_forward_norm="post_attention_layernorm")
_BRANCH_NORMS = _roles(
    attention_branch_norm="post_attention_layernorm", feed_forward_branch_norm="post_feedforward_layernorm"
)
_GEMMA2_NORMS = _BRANCH_NORMS | _roles(attention_norm="input_layernorm", feed_forward_norm="pre_feedforward_layernorm")
_FAIRSEQ_CROSS = _roles(cross_output="encoder_attn.out_proj")
_FAIRSEQ_POST = _FAIRSEQ_CROSS | _roles(
    attention_add_norm="self_attn_layer_norm",
    cross_add_norm="encoder_attn_layer_norm",
    feed_forward_add_norm="layers.*.final_layer_norm",
)
_FAIRSEQ_PRE = _FAIRSEQ_CROSS | _roles(
    attention_norm="self_attn_layer_norm",
    cross_norm="encoder_attn_layer_norm",
    feed_forward_norm="layers.*.final_layer_norm",
)
_BERT_NORMS = _roles(attention_add_norm="attention.output.LayerNorm", feed_forward_add_norm="output.LayerNorm")
_BERT_CROSS = _roles(cross_output="crossattention.output.dense", cross_add_norm="crossattention.output.LayerNorm")
_T5_NORMS = _roles(
    cross_output="EncDecAttention.o",
    attention_norm="layer.0.layer_norm",
    cross_norm="decoder.block.*.layer.1.layer_norm",
    feed_forward_norm="encoder.block.*.layer.1.layer_norm layer.2.layer_norm",
)

# The norms of blocks, and what tells sub-layers apart. Where a setting of the config moves a norm (opt) or scales what
# is added (granite), no name can say what a module does, so those model types have none.
_SUB_LAYERS: Mapping[str, Roles] = {
    **dict.fromkeys(
        (
            "bloom",
            "gemma",
            "glm",
            "gpt_neox",
            "helium",
            "llama",
            "mistral",
            "olmo",
            "phi3",
            "qwen2",
            "qwen3",
            "seed_oss",
            "smollm3",
            "stablelm",
            "starcoder2",
        ),
        _LLAMA_NORMS,
    ),
    **dict.fromkeys(("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"), _LLAMA_NORMS | _roles(feed_forward="mlp")),
    # Dense blocks have a `down`, the others a shared expert whose `down` is not the sub-layer's.
    "llama4": _roles(feed_forward="feed_forward"),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma4"), _GEMMA2_NORMS),
    **dict.fromkeys(("exaone4", "olmo2"), _BRANCH_NORMS),
    "glm4": _LLAMA_NORMS
    | _roles(attention_branch_norm="post_self_attn_layernorm", feed_forward_branch_norm="post_mlp_layernorm"),
    # Attention and feed-forward network side by side, behind one norm.
    **dict.fromkeys(("cohere", "phi"), _roles(attention_norm="input_layernorm", feed_forward_norm="input_layernorm")),
    **dict.fromkeys(("codegen", "gptj"), _roles(attention_norm="ln_1", feed_forward_norm="ln_1")),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo"), _roles(attention_norm="ln_1", feed_forward_norm="ln_2")),
    "mpt": _roles(attention_norm="norm_1", feed_forward_norm="norm_2"),
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), _BERT_NORMS | _BERT_CROSS),
    **dict.fromkeys(("deberta", "deberta-v2", "layoutlm"), _BERT_NORMS),
    "distilbert": _roles(attention_add_norm="sa_layer_norm", feed_forward_add_norm="output_layer_norm"),
    "modernbert": _roles(attention_norm="attn_norm", feed_forward_norm="mlp_norm"),
    "vit": _roles(attention_norm="layernorm_before", feed_forward_norm="layernorm_after"),
    **dict.fromkeys(("bart", "marian"), _FAIRSEQ_POST),
    **dict.fromkeys(("blenderbot", "mbart", "pegasus", "whisper"), _FAIRSEQ_PRE),
    **dict.fromkeys(("mt5", "t5"), _T5_NORMS),
}

ARCHITECTURES: Mapping[str, Roles] = {kind: {**roles, **_SUB_LAYERS.get(kind, {})} for kind, roles in _LAYERS.items()}


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
        try:
            given = hook()
        except Exception as error:
            add_note(error, f"Raised in peft_architectures of the {label}.")
            raise
        for types in check_result("peft_architectures", given, label):
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


def role_paths(model: nn.Module, role: str) -> tuple[str, ...]:
    """The paths of a model's modules that play `role`, in the model's order; none if its type has no such role.

    A fused layer stands in for the parts it computes. A module that the names of several roles fit plays the one
    whose name is the longest ("attention.output.dense" rather than "output.dense"), or all of equal length. Paths
    are those of the base, whatever adapters the model carries, and each module has one. `block` is each single module
    of the list that plays `blocks`.

    Raises:
        TargetError: what the modules of this model type are called is not known.
        ConfigError: no model type has such a role.
    """
    if role == "block":
        lists = [(path, base_modules(model)[path]) for path in role_paths(model, "blocks")]
        return tuple(f"{path}.{name}" for path, blocks in lists for name, _ in blocks.named_children())
    model_type = model_type_of(model)
    table = architecture(model_type) if model_type else None
    if table is None:
        about = f"the model type {model_type!r}" if model_type else f"a {type(model).__name__} without a model type"
        raise TargetError(
            f"what the modules of {about} are called is not known. Tell it with the hook peft_architectures, in an "
            "extension or with peft_core.register_extension, or name the modules themselves"
        )
    played = role if role in table else FUSED.get(role, role)
    if played not in table or played == "within":
        known = {name for roles in (*ARCHITECTURES.values(), *_extended().values()) for name in roles} - {"within"}
        if role not in known:
            raise ConfigError(f"no model type has a role {role!r}.{did_you_mean(role, known)}")
        return ()
    within = [re.compile(pattern) for pattern in table.get("within", ())]
    names = [
        (player == played, name.count("."), NameMatcher((name,), what=f"the role {player}", trusted=True))
        for player, entries in table.items()
        if player != "within"
        for name in entries
    ]
    found: dict[int, str] = {}
    for path, module in walk(model).modules:
        if not path or (within and not any(pattern.match(path) for pattern in within)):
            continue
        length = max((size for own, size, name in names if own and name.matches(path)), default=-1)
        if length >= 0 and not any(size > length and name.matches(path) for own, size, name in names if not own):
            found.setdefault(id(module), path)
    return tuple(found.values())


def missing_roles(config_class: type[Any], model_type: str | None) -> list[str]:
    """The class's default roles that a known model type does not have."""
    table = architecture(model_type) if model_type else None
    roles = getattr(config_class, "default_roles_for", {}).get(model_type, getattr(config_class, "default_roles", ()))
    return [role for role in roles if not (table is None or table.get(role) or table.get(FUSED.get(role, "")))]


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

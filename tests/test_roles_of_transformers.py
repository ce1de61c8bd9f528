"""The table of roles names modules that the models of transformers have, and that do what the roles say."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from peft_core import ConfigError, TargetError, get_peft_model, load_method, role_paths
from peft_core.architectures import _SUB_LAYERS, ARCHITECTURES
from peft_core.extensions import extensions
from peft_core.hookspecs import hookimpl
from peft_core.patterns import NameMatcher

# Not in transformers: models whose code comes with their weights, or that have been taken out.
ELSEWHERE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}

# Roles of models in their older form, and why they stay.
ABSENT = {
    ("mixtral", "gate"): "experts are stacked parameters since transformers 5; defaults are those of before",
    ("mixtral", "up"): "the same",
    ("mixtral", "down"): "the same",
    # A decoder over an encoder's output has them: `is_decoder=True, add_cross_attention=True`.
    **{
        (model_type, role): "only with add_cross_attention"
        for model_type in ("bert", "camembert", "electra", "roberta", "xlm-roberta")
        for role in ("cross_output", "cross_add_norm")
    },
}

# Names of variants: the language model of blip-2 may be T5 (`q`) or OPT (`q_proj`).
VARIANTS = {"blip-2": {"q", "k", "v"}}

# Heads are on the classes for their tasks.
WITH_HEAD = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM, transformers.AutoModel)


def build(model_type: str) -> nn.Module:
    config: Any = transformers.CONFIG_MAPPING[model_type]()
    for cls in WITH_HEAD:
        if type(config) in cls._model_mapping:
            with torch.device("meta"):
                model: nn.Module = cls.from_config(config)
            return model
    raise AssertionError(model_type)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() - ELSEWHERE))
def test_every_role_names_modules(model_type: str) -> None:
    model = build(model_type)
    paths = [path for path, _ in model.named_modules() if path]
    for role, names in ARCHITECTURES[model_type].items():
        if role == "within":
            assert any(NameMatcher(names[0], what=role, trusted=True).matches(path) for path in paths)
            continue
        matcher = NameMatcher(names, what=role, trusted=True)
        found = [path for path in paths if matcher.matches(path)]
        if (model_type, role) in ABSENT:
            assert not found, f"{role} is there again"
        else:
            assert found, f"no module of {model_type} is named {names} ({role})"
            assert set(matcher.unmatched()) <= VARIANTS.get(model_type, set()), role


# ---- what the roles do


WIDTH = 16
# The fields that make a model tiny, as the many config classes call them.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads", "num_experts_per_tok", "expansion_ratio"), 2
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 8,
    "patch_size": 4,
    "attention_types": [[["global", "local"], 1]],
}


def tiny(model_type: str) -> Any:
    """A model of the type that runs in milliseconds, its weights large enough for every term to matter."""
    config_class: Any = transformers.CONFIG_MAPPING[model_type]
    aliases = getattr(config_class, "attribute_map", {})
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.__dataclass_fields__}
    config = config_class(**{name: value for name, value in TINY.items() if name in known and name not in aliases})
    torch.manual_seed(0)
    model: Any = next(cls for cls in WITH_HEAD if type(config) in cls._model_mapping).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.mul_(8)
    return model


def run(model: Any, model_type: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every module in one call, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            seen[path] = (given, out[0] if isinstance(out, tuple) else out)

        return note

    for path, module in model.named_modules():
        module.register_forward_hook(noting(path), with_kwargs=True)
    ids = torch.arange(3, 13).view(2, 5)
    if model_type == "vit":
        model(pixel_values=torch.randn(2, 3, 8, 8))
    elif model_type == "whisper":
        model(ids, encoder_outputs=torch.randn(2, 5, WIDTH))
    elif "decoder_input_ids" in inspect.signature(model.forward).parameters:
        model(input_ids=ids, decoder_input_ids=ids)
    else:
        model(ids)
    return seen


def sub_layers(model: Any, block: str, seen: dict[str, Any]) -> Iterator[tuple[str, Tensor, str | None, str | None]]:
    """Of one block: the sub-layer, what it adds to the stream, the norm before it, the norm after the sum."""

    def one(role: str) -> str | None:
        found = [path for path in role_paths(model, role) if path.startswith(f"{block}.") and path in seen]
        assert len(found) <= 1, (role, found)
        return found[0] if found else None

    for kind in ("attention", "cross", "feed_forward"):
        branch = one(f"{kind}_branch_norm") if kind != "cross" else None
        last = one({"attention": "output", "cross": "cross_output"}.get(kind, "feed_forward"))
        last = branch or last or (one("down") if kind == "feed_forward" else None)
        if last is not None:
            yield kind, seen[last][1], one(f"{kind}_norm"), one(f"{kind}_add_norm")


# Text models inside others, whose configs are nested, and whose own classes have another model type.
NESTED = {"gemma4", "llama4"}


@pytest.mark.parametrize("model_type", sorted(_SUB_LAYERS.keys() - NESTED))
@torch.no_grad()
def test_sub_layers_and_norms_are_where_the_roles_say(model_type: str) -> None:
    """From the roles alone the residual stream of every block can be followed, up to the block's own output."""
    model = tiny(model_type)
    seen = run(model, model_type)
    # A sum in another order, as in blocks whose sub-layers are side by side, differs in the last bit.
    near = {"rtol": 1e-5, "atol": 1e-5}
    found = 0
    for blocks in role_paths(model, "blocks"):
        for block in (path for path in seen if path.rpartition(".")[0] == blocks and path.rpartition(".")[2].isdigit()):
            start = stream = seen[block][0]
            for _, added, before, after in sub_layers(model, block, seen):
                added = added.view(stream.shape)
                assert added.abs().mean() > 1e-3, "too small for the comparison to tell anything"
                if before is not None:
                    given = seen[before][0]
                    # Side by side with the other sub-layer, or behind it.
                    assert torch.allclose(given, stream, **near) or torch.allclose(given, start, **near), before
                stream = stream + added
                if after is not None:
                    torch.testing.assert_close(seen[after][0], stream, **near)
                    stream = seen[after][1]
                found += 1
            torch.testing.assert_close(seen[block][1], stream, **near)
    assert found >= 4  # two sub-layers in each of two blocks


class TestRolePaths:
    def test_the_longest_name_holds(self) -> None:
        """In BERT "output.dense" is also the end of "attention.output.dense"."""
        model = build("bert")
        down, output = role_paths(model, "down"), role_paths(model, "output")
        assert down[0] == "bert.encoder.layer.0.output.dense" and len(down) == 12
        assert output[0] == "bert.encoder.layer.0.attention.output.dense" and len(output) == 12

    def test_cross_attention_is_told_from_self_attention(self) -> None:
        model = build("bart")
        assert all(".self_attn." in path for path in role_paths(model, "output"))
        assert all(".encoder_attn." in path for path in role_paths(model, "cross_output"))
        assert len(role_paths(model, "attention")) == 36  # 12 in the encoder, 24 in the decoder

    def test_a_fused_layer_stands_in(self) -> None:
        model = build("gpt2")
        assert role_paths(model, "query") == role_paths(model, "qkv") != ()
        assert role_paths(model, "gate") == ()

    def test_paths_are_those_of_the_base(self) -> None:
        model = tiny("llama")
        before = role_paths(model, "down")
        get_peft_model(model, load_method("lora")(target_modules=["down_proj"]))
        assert role_paths(model, "down") == before == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")

    def test_within(self) -> None:
        paths = role_paths(build("gemma4"), "query")
        assert paths and all(".language_model." in path for path in paths)

    def test_a_role_that_nobody_has(self) -> None:
        with pytest.raises(ConfigError, match="no model type has a role 'quary'. Did you mean 'query'"):
            role_paths(build("gpt2"), "quary")

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), transformers.GPT2Model(transformers.GPT2Config(n_layer=0))])
    def test_an_unknown_type(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        if hasattr(model, "config"):
            model.config.__dict__["model_type"] = "acme"
        with pytest.raises(TargetError, match="peft_architectures"):
            role_paths(model, "query")

    def test_types_of_extensions(self) -> None:
        class Acme:
            @hookimpl
            def peft_architectures(self) -> Any:
                return {"acme": {"down": ["1"], "acme_only": ["0"]}}

        model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model.config = {"model_type": "acme"}
        extensions.register(Acme(), "acme roles")
        try:
            assert role_paths(model, "down") == ("1",)
            assert role_paths(model, "acme_only") == ("0",)
            assert role_paths(build("gpt2"), "acme_only") == ()
        finally:
            extensions.unregister("acme roles")

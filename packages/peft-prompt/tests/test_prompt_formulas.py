"""The papers' formulas, written out naively, against what the adapters compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peft_core import get_peft_model
from peft_prompt import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

N, WIDTH, HEADS, KEY_HEADS, VOCABULARY = 3, 16, 4, 2, 32
# Llama rounds to float32 in its norms and softmax; the sums here are in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.3}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config = {"vocab_size": VOCABULARY, "pad_token_id": 0, **sizes, **heads, **fields}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def adapted(config: Any, model: Any = None) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(make() if model is None else model, config).eval()
    with torch.no_grad():
        for parameter in model._peft.record("default").parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.requires_grad_(False)


def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


def in_front(model: Any, prompt: Tensor) -> Tensor:
    """Scores of [P; X], without P's positions; `prompt` is (rows, n, d)."""
    with model.disable_adapter():
        embedded = model.model.embed_tokens(ids())
        found: Tensor = model(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), embedded], 1)).logits[:, N:]
    return found


def tensors(model: Any) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in model.get_adapter_state_dict().items()}


def test_prompt_tuning_is_a_prompt_in_front() -> None:
    model = adapted(PromptTuningConfig(num_virtual_tokens=N))
    assert torch.equal(model(ids()).logits, in_front(model, tensors(model)["prompt_embeddings"]))


@pytest.mark.parametrize(("kind", "hidden"), [("MLP", 7), ("LSTM", 6)])
def test_p_tuning_is_what_a_network_makes_of_trained_vectors(kind: str, hidden: int) -> None:
    config = PromptEncoderConfig(num_virtual_tokens=N, encoder_reparameterization_type=kind, encoder_hidden_size=hidden)
    model = adapted(config)
    found = tensors(model)
    x = found["prompt_encoder.embedding.weight"]
    width = hidden
    if kind == "LSTM":
        lstm = nn.LSTM(WIDTH, hidden, num_layers=2, bidirectional=True, batch_first=True)
        head = "prompt_encoder.lstm_head."
        lstm.load_state_dict({k.removeprefix(head): v for k, v in found.items() if k.startswith(head)})
        x, width = lstm(x[None])[0][0], 2 * hidden
    layers = [0, 2, 4] if kind == "MLP" else [0, 2]
    for at in layers:
        x = x @ found[f"prompt_encoder.mlp_head.{at}.weight"].t() + found[f"prompt_encoder.mlp_head.{at}.bias"]
        x = x.relu() if at != layers[-1] else x
    assert found["prompt_encoder.mlp_head.0.weight"].shape == (width, width if kind == "LSTM" else WIDTH)
    torch.testing.assert_close(found["prompt_embeddings"], x)
    torch.testing.assert_close(model(ids()).logits, in_front(model, x), **CLOSE)


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_are_keys_and_values_that_were_there_before(projected: bool) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=projected, encoder_hidden_size=6)
    model = adapted(config)
    found = tensors(model)
    prefix = found["prompt_embeddings"]
    if projected:
        first, last = ([found[f"prompt_encoder.transform.{at}.{n}"] for n in ("weight", "bias")] for at in (0, 2))
        hidden = (found["prompt_encoder.embedding.weight"] @ first[0].t() + first[1]).tanh()
        torch.testing.assert_close(prefix, hidden @ last[0].t() + last[1])
    parts = prefix.view(N, 2, 2, KEY_HEADS, WIDTH // HEADS).permute(1, 2, 3, 0, 4)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(parts):
        cache.update(keys.expand(2, -1, -1, -1).clone(), values.expand(2, -1, -1, -1).clone(), layer)
    with model.disable_adapter():
        expected = model(ids(), cache=cache, attention_mask=torch.ones(2, N + 5)).logits
    torch.testing.assert_close(model(ids()).logits, expected, **CLOSE)


def test_multitask_prompts_are_products_of_a_shared_one() -> None:
    model = adapted(MultitaskPromptTuningConfig(num_virtual_tokens=N, num_tasks=3, num_ranks=2))
    found = tensors(model)
    tasks = [2, 0]
    prompts = []
    for task in tasks:
        factor = torch.zeros(N, WIDTH)
        for rank in range(2):
            factor += torch.outer(found["prefix_task_cols"][task, :, rank], found["prefix_task_rows"][task, rank])
        prompts.append(found["prompt_embeddings"] * factor)
    expected = in_front(model, torch.stack(prompts))
    torch.testing.assert_close(model(ids(), task_ids=torch.tensor(tasks)).logits, expected, **CLOSE)


def zero_init_attention(module: Any, out: Tensor, x: Tensor, rotary: Any, prompt: Tensor, gate: Tensor) -> Tensor:
    """Section 3.2 for one attention module of a Llama, head by head and position by position."""
    base = {name: getattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    size = WIDTH // HEADS
    q = base["q_proj"](x).unflatten(-1, (HEADS, size)).transpose(1, 2)
    q = apply_rotary_pos_emb(q, q, *rotary)[0]
    keys, values = (base[name](prompt[0]).unflatten(-1, (KEY_HEADS, size)) for name in ("k_proj", "v_proj"))
    seen = torch.zeros(*x.shape[:2], HEADS, size)
    for row in range(x.shape[0]):
        for at in range(x.shape[1]):
            for head in range(HEADS):
                group = head // (HEADS // KEY_HEADS)
                scores = torch.stack([q[row, head, at] @ key for key in keys[:, group]]) / math.sqrt(size)
                seen[row, at, head] = scores.softmax(0) @ values[:, group]
    return out + (gate * seen.flatten(2)) @ base["o_proj"].weight.t()


@pytest.mark.parametrize("bias", [False, True])
def test_llama_adapter_is_zero_init_attention(bias: bool) -> None:
    model = adapted(AdaptionPromptConfig(adapter_len=N, adapter_layers=1), make(attention_bias=bias))
    if bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.normal_()
    site = model.model.layers[1].self_attn
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen.update(x=kwargs["hidden_states"], rotary=kwargs["position_embeddings"], out=out[0])

    handle = model.model.layers[1].self_attn.register_forward_hook(note, with_kwargs=True)
    model(ids())
    with_prompt = seen["out"]
    with model.disable_adapter():
        model(ids())
    handle.remove()
    adapter = site.adapters.default
    expected = zero_init_attention(
        site.base_layer, seen["out"], seen["x"], seen["rotary"], adapter.adaption_prompt, adapter.adaption_gate
    )
    torch.testing.assert_close(with_prompt, expected, **CLOSE)
    assert not torch.allclose(with_prompt, seen["out"], atol=1e-2)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
ROTARY: dict[str, dict[str, Any]] = {
    "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "CodeGen": {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "GPTNeoX": SIZES,
    "Glm": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "Phi": SIZES,
    "Cohere": {**SIZES, "num_key_value_heads": 2},
    "Qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "Gemma3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "Phi3": {**SIZES, "num_key_value_heads": 2},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "OPT": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24}
    | {"word_embed_proj_dim": 16},
    "GPTNeo": {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}


def keys_by_hand(family: str, module: Any, prompt: Tensor) -> Tensor:
    """W_k P of an attention module as (1, heads, K, size), without anything done to it."""
    if family == "CodeGen":  # four groups, each of queries, values and keys
        fused = module.qkv_proj(prompt).view(1, N, 4, 3, -1)
        return fused[:, :, :, 2].reshape(1, N, module.num_attention_heads, -1).transpose(1, 2)
    if hasattr(module, "query_key_value"):  # by head
        return module.query_key_value(prompt).view(1, N, -1, 3, 4)[..., 1, :].transpose(1, 2)
    if hasattr(module, "qkv_proj"):
        return module.qkv_proj(prompt)[..., 16:24].view(1, N, 2, 4).transpose(1, 2)
    module = getattr(module, "attention", module)  # GPT-Neo
    found: Tensor = module.k_proj(prompt).view(1, N, -1, module.head_dim)
    found = module.k_norm(found) if family in ("Qwen3", "Gemma3") else found
    return found.transpose(1, 2)


@pytest.mark.parametrize("family", ROTARY)
def test_prompts_have_no_position(family: str) -> None:
    """A query's share of a prompt is that of a sequence of it alone, wherever in a longer one it stands."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**ROTARY[family], vocab_size=VOCABULARY, pad_token_id=0)
    model = adapted(
        AdaptionPromptConfig(adapter_len=N, adapter_layers=2), getattr(transformers, f"{family}ForCausalLM")(config)
    )
    adapter = model._peft.record("default").adapters[-1]
    seen: list[dict[str, Any]] = []
    kept = adapter._keys_of

    def noted(prompt: Tensor, given: dict[str, Any]) -> Any:
        seen.append({"pair": kept(prompt, given)})
        return seen[-1]["pair"]

    adapter._keys_of = noted
    model(ids())
    with torch.no_grad():
        cache = model(ids()[:, :3]).cache
        model(ids()[:, 3:4], cache=cache)
    for one in seen[1:]:
        for first, other in zip(seen[0]["pair"], one["pair"], strict=True):
            assert torch.equal(first, other)
    by_hand = keys_by_hand(family, adapter.layer.module, adapter.adaption_prompt)
    torch.testing.assert_close(seen[0]["pair"][0], by_hand, **CLOSE)
    # The same vectors in another order are the same keys in that order: nothing in them tells where they stand.
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        before = model(ids()).logits
        for one in model._peft.record("default").adapters:
            one.adaption_prompt.copy_(one.adaption_prompt[:, order])
    torch.testing.assert_close(model(ids()).logits, before, **CLOSE)

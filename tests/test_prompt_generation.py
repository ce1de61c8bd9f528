"""Virtual tokens and key/value prefixes in transformers' own models: generation, caches, files, HF PEFT's numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from prompt_toys import PrefixConfig, PromptConfig, prompt_methods
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

from peft_core import PeftModel, RequestError, get_peft_model
from tests.tiny_transformers import VOCABULARY, batch, gradients, lora, make, randomise
from tests.toy_plugins import registered

METHODS = {"prompt": PromptConfig, "prefix": PrefixConfig}
KINDS = ("llama", "gpt2")
N = 3
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
# Sums in another order (another kernel, a row alone or in a batch) on scores of up to a hundred, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def _methods() -> Iterator[None]:
    with prompt_methods():
        yield


def with_adapter(kind: str, method: str, **fields: Any) -> Any:
    model = make(kind, **fields)
    return get_peft_model(model, METHODS[method](n=N)).requires_grad_(False)


def prompt_of(model: Any, name: str = "default") -> Tensor:
    return model._peft.adapters[name].adapters[0].prompt.detach()


def key_values_of(model: Any, name: str = "default") -> list[tuple[Tensor, Tensor]]:
    return [(a.keys.detach(), a.values.detach()) for a in model._peft.adapters[name].adapters if hasattr(a, "keys")]


def generate_rows(model: Any, given: dict[str, Tensor], **how: Any) -> list[Tensor]:
    """What each row gives alone, without its padding."""
    found = []
    for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
        own = ids[mask.bool()][None]
        found.append(model.generate(own, attention_mask=torch.ones_like(own), **how)[0, -8:])
    return found


both = pytest.mark.parametrize("method", METHODS)
each = pytest.mark.parametrize("kind", KINDS)


# -- one call ----------------------------------------------------------------------------------------------------------


@each
def test_scores_and_loss_of_virtual_tokens_by_hand(kind: str) -> None:
    model, given = with_adapter(kind, "prompt"), batch(kind)
    ids = given["input_ids"]
    mask = torch.cat([torch.ones(4, N, dtype=torch.long), given["attention_mask"]], 1)
    with model.disable_adapter():
        longer = torch.cat([prompt_of(model).expand(4, -1, -1), model.get_input_embeddings()(ids)], 1)
        expected = model(inputs_embeds=longer, attention_mask=mask).logits[:, N:]
        bare = model(**given).logits
    out = model(**given, labels=ids)
    assert torch.equal(out.logits, expected) and not torch.allclose(out.logits, bare)
    by_hand = cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)  # the labels are the user's, none is of a virtual token


@each
def test_scores_of_prefixes_by_hand(kind: str) -> None:
    model, ids = with_adapter(kind, "prefix"), batch(kind)["input_ids"]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(key_values_of(model)):
        cache.update(keys.expand(4, -1, -1, -1), values.expand(4, -1, -1, -1), layer)
    mask = torch.ones(4, N + 5, dtype=torch.long)
    with model.disable_adapter():
        expected = model(ids, attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@both
@each
def test_the_same_as_hf_peft(kind: str, method: str) -> None:
    model, given = with_adapter(kind, method), batch(kind)
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this release of peft uses names that transformers deprecates
        oracle = peft.get_peft_model(make(kind), config(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
        with torch.no_grad():
            weight = oracle.prompt_encoder["default"].embedding.weight
            if method == "prompt":
                weight.copy_(prompt_of(model))
            else:  # (n, layers · 2 · heads · dimension)
                pairs = torch.stack([torch.stack(pair) for pair in key_values_of(model)])
                weight.copy_(pairs.permute(3, 0, 1, 2, 4).flatten(1))
        for arguments in ({"input_ids": given["input_ids"]}, given):
            expected = oracle(**arguments).logits[:, -5:]  # of a prompt's own positions it returns scores too
            seen = arguments.get("attention_mask", torch.ones(4, 5)).bool()
            torch.testing.assert_close(model(**arguments).logits[seen], expected[seen], **CLOSE)


@both
@each
def test_hidden_states_and_attentions_are_of_the_users_positions(kind: str, method: str) -> None:
    model, given = with_adapter(kind, method, attn_implementation="eager"), batch(kind)
    out = model(**given, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and all(h.shape[:2] == (4, 5) for h in out.hidden_states)
    # An attention to a prefix is one to keys that no position has.
    assert all(a.shape[-2:] == (5, 5 if method == "prompt" else N + 5) for a in out.attentions)
    assert out.cache.get_seq_length() == 5
    step = model(given["input_ids"][:, :1], cache=out.cache, output_attentions=True)
    assert step.attentions[0].shape[-2:] == (1, 6 if method == "prompt" else N + 6)


@both
@each
def test_switched_off_it_is_the_base_bit_for_bit(kind: str, method: str) -> None:
    model, given = with_adapter(kind, method), batch(kind)
    bare = make(kind)
    expected, generated = bare(**given).logits, bare.generate(**given, **GREEDY)
    assert not torch.equal(model.generate(**given, **GREEDY), generated)
    with model.disable_adapter():
        assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model.generate(**given, **GREEDY), generated)
        assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), generated)
    model.unload()
    assert torch.equal(model(**given).logits, expected)


@both
@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(kind: str, method: str, reentrant: bool) -> None:
    found = []
    for enabled in (False, True):
        model = get_peft_model(make(kind, use_cache=False), METHODS[method](n=N)).train()
        if enabled:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch(kind), labels=batch(kind)["input_ids"]).loss.backward()
        found.append(gradients(model))
    assert found[0] and all(g.abs().sum() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@both
@each
def test_one_graph(kind: str, method: str) -> None:
    model, ids = with_adapter(kind, method), batch(kind)["input_ids"]
    expected = model(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(ids)  # returns a cache too: it is made inside the graph
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert found.cache.get_seq_length() == 5
    last = ids[:, :1]
    again = model(last, cache=found.cache)
    torch.testing.assert_close(again.logits, model(torch.cat([ids, last], 1)).logits[:, -1:], **CLOSE)


@both
@each
def test_one_graph_for_each_step_of_a_static_cache(kind: str, method: str) -> None:
    model, given = with_adapter(kind, method), batch(kind)
    mask, found = given["attention_mask"], []
    room = 16 - N if method == "prompt" else 16  # of the user's positions: the masks' length, the same at each step
    for compiled in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=16)
        scores = model(**given, cache=cache, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        for at in range(3):
            seen = torch.cat([mask, torch.ones(4, at + 1, dtype=torch.long)], 1)
            seen = torch.nn.functional.pad(seen, (0, room - seen.shape[1]))
            ids, positions = scores[:, -1:].argmax(-1), mask.sum(1, keepdim=True) + at
            scores = step(ids, attention_mask=seen, cache=cache, position_ids=positions).logits
            found.append(scores)
        assert int(cache.get_seq_length()) == 8
    torch.testing.assert_close(torch.stack(found[:3]), torch.stack(found[3:]), **CLOSE)


# -- generation --------------------------------------------------------------------------------------------------------


@both
@each
def test_t3_a_left_padded_batch_gives_what_its_rows_give(kind: str, method: str) -> None:
    model, given = with_adapter(kind, method), batch(kind)
    for how in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        together = model.generate(**given, **GREEDY, **how)[:, -8:]
        alone = generate_rows(model, given, **GREEDY, **how)
        assert torch.equal(together, torch.stack(alone))


@both
@each
@pytest.mark.parametrize("rows", [1, 4], ids=["unpadded", "padded"])
def test_all_ways_to_generate_agree(kind: str, method: str, rows: int) -> None:
    model = with_adapter(kind, method)
    given = batch(kind, rows=rows)
    expected = model.generate(**given, **GREEDY)
    ways: list[dict[str, Any]] = [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"cache": DynamicCache()},
        {"cache": StaticCache(config=model.config, max_cache_len=24)},
    ]
    for how in ways:
        assert torch.equal(model.generate(**given, **GREEDY, **how), expected), how
    embedded = model.get_input_embeddings()(given["input_ids"])
    mask = given["attention_mask"]
    assert torch.equal(model.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY), expected[:, -8:])
    if rows == 1:
        assert torch.equal(model.generate(**given, **GREEDY, prompt_lookup_num_tokens=2), expected)
    beams = model.generate(**given, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(**given, **GREEDY, num_beams=3, use_cache=False), beams)
    drawn = []
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        drawn.append(model.generate(**given, do_sample=True, max_new_tokens=8, num_return_sequences=2, **how))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@both
@each
def test_a_generation_goes_on_from_its_cache(kind: str, method: str) -> None:
    model, given = with_adapter(kind, method), batch(kind)
    out = model.generate(**given, **GREEDY, return_dict_in_generate=True)
    assert out.cache.get_seq_length() == 12
    mask = torch.cat([given["attention_mask"], torch.ones(4, 8, dtype=torch.long)], 1)
    expected = model.generate(out.sequences, attention_mask=mask, **GREEDY)
    for cache in (copy.deepcopy(out.cache), out.cache):
        assert torch.equal(model.generate(out.sequences, attention_mask=mask, cache=cache, **GREEDY), expected)


@each
def test_a_cache_filled_without_the_prompt_is_refused_and_the_other_way_round(kind: str) -> None:
    model, given = with_adapter(kind, "prompt"), batch(kind, rows=1)
    own = model.generate(**given, **GREEDY, return_dict_in_generate=True)
    with model.disable_adapter():
        bare = model.generate(**given, **GREEDY, return_dict_in_generate=True)
        with pytest.raises(RequestError, match="holds 3 virtual tokens"):
            model.generate(own.sequences, cache=own.cache, **GREEDY)
    with pytest.raises(RequestError, match="filled without the virtual tokens"):
        model.generate(bare.sequences, cache=bare.cache, **GREEDY)
    assert own.cache.get_seq_length() == 12  # the refusals changed nothing
    assert torch.equal(
        model.generate(own.sequences, cache=own.cache, **GREEDY), model.generate(own.sequences, **GREEDY)
    )


def test_a_static_cache_that_is_too_short_is_refused() -> None:
    model, given = with_adapter("llama", "prompt"), batch("llama", rows=1)
    short = StaticCache(config=model.config, max_cache_len=5 + 7)
    with pytest.raises(RequestError, match="room for 12 positions; this generation and the 3 .* need 15"):
        model.generate(**given, **GREEDY, cache=short)
    with pytest.raises(RequestError, match="Make it 3 longer"):
        model(given["input_ids"], cache=StaticCache(config=model.config, max_cache_len=6))
    exact = StaticCache(config=model.config, max_cache_len=15)
    assert torch.equal(model.generate(**given, **GREEDY, cache=exact), model.generate(**given, **GREEDY))


@each
def test_two_prompts_a_prefix_and_lora_at_once(kind: str) -> None:
    model = get_peft_model(make(kind), PromptConfig(n=3), "a")
    for name, config in (("b", PromptConfig(n=2)), ("p", PrefixConfig(n=2)), ("l", lora(kind))):
        model.add_adapter(name, config)
    randomise(model, "l")
    given = batch(kind)
    outputs = []
    for active in (["a", "b"], ["a", "l"], ["p", "a", "l"], ["l", "b", "a", "p"]):
        model.set_adapter(active)
        expected = model.generate(**given, **GREEDY)
        outputs.append(expected)
        for how in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**given, **GREEDY, **how), expected), (active, how)
        assert torch.equal(torch.stack(generate_rows(model, given, **GREEDY)), expected[:, -8:]), active
    assert len({str(o.tolist()) for o in outputs}) == len(outputs)


def test_with_the_example_of_a_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "acme-vera" / "src"))
    import acme_vera  # not installed here; as a module of a notebook would be

    with registered(acme_vera):
        _mixes_with(acme_vera.VeraConfig(target_modules=["q_proj", "v_proj"]))


def _mixes_with(config: Any) -> None:
    model = get_peft_model(make("llama"), config, "v")
    randomise(model, "v")
    model.add_adapter("a", PromptConfig(n=N))
    model.set_adapter(["v", "a"])
    given = batch("llama")
    together = model.generate(**given, **GREEDY)
    assert torch.equal(torch.stack(generate_rows(model, given, **GREEDY)), together[:, -8:])
    with model.disable_adapter():
        longer = torch.cat(
            [prompt_of(model, "a").expand(4, -1, -1), model.get_input_embeddings()(given["input_ids"])], 1
        )
    model.set_adapter("v")
    expected = model(inputs_embeds=longer).logits[:, N:]
    model.set_adapter(["v", "a"])
    assert torch.equal(model(given["input_ids"]).logits, expected)


@both
@each
@pytest.mark.parametrize("other", [3, 5])
def test_one_adapter_for_each_row(kind: str, method: str, other: int) -> None:
    model = get_peft_model(make(kind), METHODS[method](n=3), "a")
    model.add_adapter("b", METHODS[method](n=other))
    model.add_adapter("l", lora(kind))
    randomise(model, "l")
    given, names = batch(kind), ["a", "b", "__base__", "l"]
    for how in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        together = model.generate(**given, **GREEDY, **how, adapter_names=names)
        for row, name in enumerate(names):
            own = {k: v[row : row + 1, row % 4 :] for k, v in given.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(**own, **GREEDY, **how)
            else:
                model.set_adapter(name)
                alone = model.generate(**own, **GREEDY, **how)
            assert torch.equal(together[row, -8:], alone[0, -8:]), (name, how)


@both
@each
def test_save_and_load(kind: str, method: str, tmp_path: Path) -> None:
    model, given = with_adapter(kind, method), batch(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(kind), tmp_path)
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert torch.equal(loaded.generate(**given, **GREEDY), model.generate(**given, **GREEDY))


def test_a_backbone_that_is_the_model_itself() -> None:
    torch.manual_seed(0)
    config = make("llama").config
    model = get_peft_model(transformers.LlamaModel(config).eval(), PromptConfig(n=N))
    ids = batch("llama")["input_ids"]
    with model.disable_adapter():
        longer = torch.cat([prompt_of(model).expand(4, -1, -1), model.embed_tokens(ids)], 1)
        expected = model(inputs_embeds=longer).last_hidden_state[:, N:]
    out = model(ids)
    assert torch.equal(out.last_hidden_state, expected) and out.cache.get_seq_length() == 5


# -- encoders ----------------------------------------------------------------------------------------------------------


def right_padded() -> dict[str, Tensor]:
    given = batch("t5")
    return {name: given[name].flip(1) for name in ("input_ids", "attention_mask")}


def test_a_prompt_of_an_encoder_is_seen_by_the_decoder() -> None:
    model = with_adapter("t5", "prompt")
    given, decoder = right_padded(), batch("t5")["decoder_input_ids"]
    got = model(**given, decoder_input_ids=decoder).logits
    mask = torch.cat([torch.ones(4, N, dtype=torch.long), given["attention_mask"]], 1)
    with model.disable_adapter():
        longer = torch.cat([prompt_of(model).expand(4, -1, -1), model.shared(given["input_ids"])], 1)
        expected = model(inputs_embeds=longer, attention_mask=mask, decoder_input_ids=decoder).logits
        assert not torch.allclose(model(**given, decoder_input_ids=decoder).logits, got, **CLOSE)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["prompt", "prefix", "cross"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models_generate(kind: str, method: str) -> None:
    if kind == "t5":
        model = make(kind)
    else:
        fields = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "forced_eos_token_id": None}
        torch.manual_seed(0)
        config = transformers.BartConfig(
            vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **fields, **heads
        )
        model = transformers.BartForConditionalGeneration(config).eval()
    model = get_peft_model(
        model, PromptConfig(n=N) if method == "prompt" else PrefixConfig(n=N, cross=method == "cross")
    )
    given = right_padded()
    expected = model.generate(**given, **GREEDY)
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**given, **GREEDY, **how), expected), how
    assert torch.equal(torch.stack(generate_rows(model, given, **GREEDY)), expected[:, -8:])
    beams = model.generate(**given, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(**given, **GREEDY, num_beams=3, use_cache=False), beams)


def test_rows_of_an_encoder_decoder_model_have_their_own_prompts() -> None:
    model = get_peft_model(make("t5"), PromptConfig(n=3), "a")
    model.add_adapter("b", PromptConfig(n=5))
    given, names = right_padded(), ["a", "b", "__base__", "b"]
    for mask in (given["attention_mask"], None):
        full = {"input_ids": given["input_ids"], "attention_mask": mask}
        together = model.generate(**full, **GREEDY, adapter_names=names)
        for row, name in enumerate(names):
            own = {k: v if v is None else v[row : row + 1] for k, v in full.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(**own, **GREEDY)
            else:
                model.set_adapter(name)
                alone = model.generate(**own, **GREEDY)
            assert torch.equal(together[row], alone[0]), (name, mask is None)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_heads_of_encoders_see_the_users_positions(family: str, method: str, head: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}For{head}")(config).eval()
    get_peft_model(model, METHODS[method](n=N))
    given = right_padded()
    out = model(**given)[0]
    with model.disable_adapter():
        bare = model(**given)[0]
    assert out.shape == bare.shape and not torch.allclose(out, bare, **CLOSE)
    for row in range(4):
        own = given["input_ids"][row, given["attention_mask"][row].bool()][None]
        alone = model(own)[0][0]
        together = out[row] if head == "SequenceClassification" else out[row, : own.shape[1]]
        torch.testing.assert_close(together, alone, **CLOSE)
    # Positions that are given by hand, for rows with prompts of different lengths, begin where the model's begin.
    model.add_adapter("longer", METHODS[method](n=N + 2))
    mixed = model(**given, adapter_names=["default", "longer"] * 2)[0]
    for row, name in enumerate(["default", "longer"] * 2):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(**given)[0][row], **CLOSE)


# -- other architectures -----------------------------------------------------------------------------------------------

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = {**LAYERS, "num_key_value_heads": 2, "head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 24, "n_layer": 2, "n_head": 6},  # biases by distance, heads that are no power of two
    "OPT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 24,
        "word_embed_proj_dim": 8,
    },
    "GPTNeo": {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "GPTNeoX": LAYERS,
    "Glm": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Qwen3": GROUPED,
    "Gemma2": {**GROUPED, "sliding_window": 8, "attn_implementation": "eager"},  # every other layer has a window
}


@both
@pytest.mark.parametrize("family", OTHERS)
def test_other_architectures_generate(family: str, method: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **OTHERS[family], vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    bare = model(batch("llama")["input_ids"]).logits
    get_peft_model(model, METHODS[method](n=N))
    given = batch("llama")
    assert not torch.allclose(model(given["input_ids"]).logits, bare, **CLOSE)
    expected = model.generate(**given, **GREEDY)
    assert torch.equal(torch.stack(generate_rows(model, given, **GREEDY)), expected[:, -8:])
    assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), expected)
    if family != "GPTNeo":  # whose windows are wrong with static caches, with adapters or without
        assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), expected)

"""Prompt methods against Hugging Face's PEFT, as a black box: files in both directions, and the same outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import peft_prompt
from peft_core import CheckpointError, PeftModel, TargetError, get_peft_model
from tests.tiny_transformers import make, randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # HF's library uses names that transformers deprecates, and warns

N, ROWS, LENGTH, VOCABULARY = 3, 4, 5, 32
# The projection is computed layer by layer here and in one product there; LLaMA-Adapter's prompt is put behind a
# second run of the attention module. In float32, on scores of up to ten.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES: dict[str, dict[str, Any]] = {
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "DebertaV2": ENCODER,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Mistral": {**ENCODER, "num_key_value_heads": 1},
    "Bart": {"d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
}


def built(family: str, head: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES[family], vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    for name, value in fields.items():
        setattr(config, name, value)
    model = getattr(transformers, family + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: make("llama", num_hidden_layers=3), "CAUSAL_LM"),
    "gpt2": (lambda: make("gpt2", n_layer=3), "CAUSAL_LM"),
    "mistral": (lambda: built("Mistral", "ForCausalLM"), "CAUSAL_LM"),
    "t5": (lambda: make("t5", num_layers=3), "SEQ_2_SEQ_LM"),
    "t5 of two layers": (lambda: make("t5"), "SEQ_2_SEQ_LM"),
    "bart": (lambda: built("Bart", "ForConditionalGeneration"), "SEQ_2_SEQ_LM"),
    "bert": (lambda: built("Bert", "ForSequenceClassification", num_labels=3), "SEQ_CLS"),
    "roberta": (lambda: built("Roberta", "ForSequenceClassification", num_labels=3), "SEQ_CLS"),
    "deberta-v2": (lambda: built("DebertaV2", "ForSequenceClassification", num_labels=3), "SEQ_CLS"),
    "gpt2 classifier": (lambda: built("GPT2", "ForSequenceClassification", num_labels=3), "SEQ_CLS"),
    "bert tagger": (lambda: built("Bert", "ForTokenClassification", num_labels=3), "TOKEN_CLS"),
    "bert features": (lambda: built("Bert", "Model"), "FEATURE_EXTRACTION"),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "p-lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": N, "adapter_layers": 2}),
}
PROMPTS = ("prompt", "p-mlp", "p-lstm")
CASES = [
    *[(kind, method) for kind in ("llama", "gpt2") for method in METHODS],
    *[("mistral", method) for method in ("prefix", "adaption")],
    *[(kind, method) for kind in ("t5", "bart") for method in (*PROMPTS, "prefix", "projected", "multitask")],
    ("t5 of two layers", "prefix"),  # of an even number of layers, some parts of HF's table have no effect
    *[(kind, method) for kind in ("bert", "roberta", "deberta-v2") for method in (*PROMPTS, "multitask")],
    *[("gpt2 classifier", method) for method in (*PROMPTS, "multitask", "adaption")],
    *[("bert tagger", method) for method in (*PROMPTS, "multitask")],
    *[("bert features", method) for method in (*PROMPTS, "prefix", "projected")],
]
each = pytest.mark.parametrize(("kind", "method"), CASES)


def config_of(library: Any, kind: str, method: str) -> Any:
    name, fields = METHODS[method]
    length = {} if method == "adaption" else {"num_virtual_tokens": N}
    return getattr(library, name)(task_type=MODELS[kind][1], **length, **fields)


def arguments(kind: str, method: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch with a padded row, and where its positions count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    # HF's form embeds the input itself, and a decoder's classifier then cannot see padding on the right.
    mask[1, :2] = 0
    if MODELS[kind][1] != "CAUSAL_LM" and kind != "gpt2 classifier":
        mask = mask.flip(1)
    given = {"input_ids": ids * mask, "attention_mask": mask}
    if MODELS[kind][1] == "SEQ_2_SEQ_LM":
        given["labels"] = ids.flip(1)
        mask = torch.ones_like(ids)
    if method == "multitask":
        given["task_ids"] = torch.tensor([0, 2, 1, 0])
    return given, mask.bool()


def scores(model: Any, given: dict[str, Tensor], seen: Tensor) -> Tensor:
    """What the model says of the user's positions; HF's form returns the virtual ones' too."""
    with torch.no_grad():
        out = model(**given)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found[:, -LENGTH:][seen] if found.dim() == 3 else found


def theirs(kind: str, method: str, **fields: Any) -> Any:
    """HF's, with values that matter."""
    base = MODELS[kind][0]()
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config_of(peft, kind, method)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "classifier" not in name else 0.1))
    return model


@each
def test_their_files_here(kind: str, method: str, tmp_path: Path) -> None:
    oracle = theirs(kind, method)
    oracle.save_pretrained(tmp_path)
    given, seen = arguments(kind, method)
    model = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path)
    expected = scores(oracle, given, seen)
    torch.testing.assert_close(scores(model, given, seen), expected, **CLOSE)
    with model.disable_adapter():
        bare = {name: value for name, value in given.items() if name != "task_ids"}
        assert not torch.allclose(scores(model, bare, seen), expected, atol=1e-3)
    # Saved again, it is the same file to them.
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    again = peft.PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "again").eval()
    torch.testing.assert_close(scores(again, given, seen), expected, **CLOSE)


@each
def test_our_files_there(kind: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = randomise(get_peft_model(MODELS[kind][0](), config_of(peft_prompt, kind, method)))
    model.save_pretrained(tmp_path)
    given, seen = arguments(kind, method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        oracle = peft.PeftModel.from_pretrained(MODELS[kind][0](), tmp_path).eval()
    assert not [w for w in caught if "issing" in str(w.message) or "unexpected" in str(w.message).lower()]
    torch.testing.assert_close(scores(oracle, given, seen), scores(model, given, seen), **CLOSE)
    loaded = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path)
    torch.testing.assert_close(scores(loaded, given, seen), scores(model, given, seen), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens(kind: str, method: str, tmp_path: Path) -> None:
    oracle = theirs(kind, method)
    oracle.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path)
    given, _ = arguments(kind, method)
    row = {name: value[:1] for name, value in given.items()}
    expected = dict(row)
    for _ in range(6):  # by their forward: their generate loses the prompt with this release of transformers
        with torch.no_grad():
            token = oracle(**expected).logits[:, -1:].argmax(-1)
        expected["input_ids"] = torch.cat([expected["input_ids"], token], 1)
        expected["attention_mask"] = torch.ones_like(expected["input_ids"])
    tokens = model.generate(**row, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, expected["input_ids"])


def test_the_loss_of_theirs_also_counts_the_first_token(tmp_path: Path) -> None:
    """Theirs predicts the first token from the last virtual position; here labels are shifted as the model does."""
    oracle = theirs("llama", "prompt")
    oracle.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path)
    ids = arguments("llama", "prompt")[0]["input_ids"][:1]
    logits = oracle(input_ids=ids).logits
    whole = torch.nn.functional.cross_entropy(logits[0, N - 1 : -1], ids[0])
    torch.testing.assert_close(oracle(input_ids=ids, labels=ids).loss, whole)
    without = torch.nn.functional.cross_entropy(logits[0, N:-1], ids[0, 1:])
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, without)
    longer = torch.cat([ids[:, :1], ids], 1)  # with a token in front that is not predicted, they agree
    seen = torch.cat([torch.full_like(ids[:, :1], -100), ids], 1)
    ours, other = (m(input_ids=longer, labels=seen).loss for m in (model, oracle))
    torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("method", ["p-mlp", "p-lstm", "projected"])
def test_a_file_without_the_network_is_not_trained_further(method: str, tmp_path: Path) -> None:
    theirs("llama", method).save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, TargetError), match="the prompt that a network made and not the network"):
        PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path, is_trainable=True)
    model = PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path)
    assert not [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", ["prompt", "prefix", "multitask", "adaption"])
def test_a_file_of_theirs_is_trained_further(method: str, tmp_path: Path) -> None:
    theirs("llama", method).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path, is_trainable=True)
    given, _ = arguments("llama", method)
    model(**given, labels=given["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_target_tasks_start_as_theirs_do(start: str, tmp_path: Path) -> None:
    theirs("llama", "multitask").save_pretrained(tmp_path)
    fields = {"prompt_tuning_init": start, "prompt_tuning_init_task": 2, "num_ranks": 2, "num_virtual_tokens": N}
    fields["prompt_tuning_init_state_dict_path"] = str(tmp_path / "adapter_model.safetensors")
    found = []
    for library, get in ((peft, peft.get_peft_model), (peft_prompt, get_peft_model)):
        model = get(MODELS["llama"][0](), library.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **fields))
        model.save_pretrained(tmp_path / library.__name__)
        found.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
    names = ["prompt_embeddings"] if start == "ONLY_SOURCE_SHARED" else list(found[0])
    assert found[0].keys() == found[1].keys()
    for name in names:
        torch.testing.assert_close(found[1][name], found[0][name])
    # Theirs cannot be loaded without the source's file; ours does not speak of it.
    (tmp_path / "adapter_model.safetensors").unlink()
    loaded = peft.PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path / "peft_prompt")
    assert loaded.active_peft_config.prompt_tuning_init_state_dict_path is None


def test_text_and_zero_starts_are_theirs(tmp_path: Path) -> None:
    from tests.prompt_tokenizer import tokenizer

    tokenizer().save_pretrained(tmp_path)
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "b d a", "num_virtual_tokens": 7}
    fields |= {"tokenizer_name_or_path": str(tmp_path), "task_type": "CAUSAL_LM"}
    oracle = peft.get_peft_model(MODELS["llama"][0](), peft.PromptTuningConfig(**fields))
    model = get_peft_model(MODELS["llama"][0](), peft_prompt.PromptTuningConfig(**fields))
    mine = model.get_adapter_state_dict()["prompt_embeddings"]
    assert torch.equal(mine, peft.get_peft_model_state_dict(oracle)["prompt_embeddings"])
    model.save_pretrained(tmp_path / "ours")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert peft.PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path / "ours")
    for name in (None, "somewhere"):  # a tokenizer of one's own: its tokens are not in the file
        own = tokenizer()
        own.name_or_path = name or ""
        given = {**fields, "tokenizer_name_or_path": own, "num_virtual_tokens": N}
        model = get_peft_model(MODELS["llama"][0](), peft_prompt.PromptTuningConfig(**given))
        assert torch.equal(model.get_adapter_state_dict()["prompt_embeddings"], mine[:N])
        model.save_pretrained(tmp_path / "own")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # about fields that they do not know
            found = peft.PeftConfig.from_pretrained(str(tmp_path / "own"))
        assert (found.tokenizer_name_or_path, found.prompt_tuning_init) == (name, "TEXT" if name else "RANDOM")
    for projected in (False, True):
        config = peft_prompt.PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=projected, init_weights="zero")
        zero = get_peft_model(MODELS["llama"][0](), config, "z").get_adapter_state_dict("z")["prompt_embeddings"]
        assert not zero.any()


def test_their_enums_are_strings_here() -> None:
    config = peft_prompt.PromptTuningConfig(prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB)
    assert config.prompt_tuning_init == "SAMPLE_VOCAB"
    kind = peft.PromptEncoderReparameterizationType.LSTM
    assert (
        peft_prompt.PromptEncoderConfig(encoder_reparameterization_type=kind).encoder_reparameterization_type == "LSTM"
    )
    kind = peft.MultitaskPromptTuningInit.ONLY_SOURCE_SHARED
    config = peft_prompt.MultitaskPromptTuningConfig(prompt_tuning_init=kind, prompt_tuning_init_state_dict_path="x")
    assert config.to_dict()["prompt_tuning_init"] == "ONLY_SOURCE_SHARED"


def test_sizes_that_are_left_open_are_theirs() -> None:
    for kind, method in CASES:
        mine = get_peft_model(MODELS[kind][0](), config_of(peft_prompt, kind, method))._peft.record("default").config
        other = theirs(kind, method).active_peft_config
        names = [
            n for n in type(mine).model_fields if hasattr(other, n) and n not in ("inference_mode", "modules_to_save")
        ]
        if MODELS[kind][1] == "SEQ_2_SEQ_LM" and method in PROMPTS:
            names.remove("num_transformer_submodules")  # of theirs, the second half has no effect
        differ = {n: (getattr(mine, n), getattr(other, n)) for n in names if getattr(mine, n) != getattr(other, n)}
        differ = {n: pair for n, pair in differ.items() if str(getattr(pair[1], "value", pair[1])) != str(pair[0])}
        assert not differ, (kind, method)

"""Prompt methods in transformers' models: generation, rows, mixing, compilation, checkpointing, resumed training."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Trainer, TrainingArguments

from peft_core import MergeError, PeftModel, RequestError, TargetError, get_peft_model
from peft_prompt import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from tests.tiny_transformers import batch, gradients, lora, make, randomise

N = 3
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
# Sums in another order (another kernel, a row alone or in a batch) on scores of up to a hundred, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CONFIGS: dict[str, Any] = {
    "prompt": PromptTuningConfig(num_virtual_tokens=N),
    "p-mlp": PromptEncoderConfig(num_virtual_tokens=N),
    "p-lstm": PromptEncoderConfig(num_virtual_tokens=N, encoder_reparameterization_type="LSTM", encoder_dropout=0.5),
    "prefix": PrefixTuningConfig(num_virtual_tokens=N),
    "projected": PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=True),
    "multitask": MultitaskPromptTuningConfig(num_virtual_tokens=N, num_tasks=3, num_ranks=2),
    "adaption": AdaptionPromptConfig(adapter_len=N, adapter_layers=2),
}
SEQ2SEQ = [name for name in CONFIGS if name != "adaption"]
TASKS = torch.tensor([0, 2, 1, 2])
every = pytest.mark.parametrize("method", CONFIGS)
each = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def adapted(kind: str, *methods: str, **fields: Any) -> Any:
    """A model with these methods' adapters, called by the methods' names, the first one active."""
    torch.manual_seed(5)
    model = get_peft_model(make(kind, **fields), CONFIGS[methods[0]], methods[0])
    for name in methods[1:]:
        model.add_adapter(name, CONFIGS[name])
    for seed, name in enumerate(methods):
        randomise(model, name, seed=seed + 1, std=0.5)
    return model.eval()


def given_to(kind: str, method: str, rows: int = 4) -> dict[str, Tensor]:
    given = batch(kind, rows=rows)
    if kind == "t5":
        given = {"input_ids": given["input_ids"].flip(1), "attention_mask": given["attention_mask"].flip(1)}
    return {**given, "task_ids": TASKS[:rows]} if method == "multitask" else given


def rows_alone(model: Any, given: dict[str, Tensor], **how: Any) -> Tensor:
    """What each row gives alone, without its padding."""
    found = []
    for row in range(len(given["input_ids"])):
        own = {name: value[row : row + 1] for name, value in given.items()}
        seen = own["attention_mask"][0].bool()
        own = {name: value[:, seen] if value.dim() == 2 else value for name, value in own.items()}
        found.append(model.generate(**own, **how)[0, -8:])
    return torch.stack(found)


# -- generation --------------------------------------------------------------------------------------------------------


@every
@each
def test_all_ways_to_generate_agree(kind: str, method: str) -> None:
    model, given = adapted(kind, method), given_to(kind, method)
    expected = model.generate(**given, **GREEDY)
    with model.disable_adapter():
        bare = {name: value for name, value in given.items() if name != "task_ids"}
        assert not torch.equal(model.generate(**bare, **GREEDY), expected)
    assert torch.equal(rows_alone(model, given, **GREEDY), expected[:, -8:])
    for how in ({"use_cache": False}, {"cache_implementation": "static"}, {"cache": DynamicCache()}):
        assert torch.equal(model.generate(**given, **GREEDY, **how), expected), how
    others = {name: value for name, value in given.items() if name != "input_ids"}
    embedded = model.get_input_embeddings()(given["input_ids"])
    assert torch.equal(model.generate(inputs_embeds=embedded, **others, **GREEDY), expected[:, -8:])
    beams = model.generate(**given, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(**given, **GREEDY, num_beams=3, use_cache=False), beams)
    assert torch.equal(rows_alone(model, given, **GREEDY, num_beams=3), beams[:, -8:])
    drawn = []
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        drawn.append(model.generate(**given, do_sample=True, max_new_tokens=8, num_return_sequences=2, **how))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@every
@each
def test_a_generation_goes_on_and_is_helped(kind: str, method: str) -> None:
    model, given = adapted(kind, method), given_to(kind, method)
    out = model.generate(**given, **GREEDY, return_dict_in_generate=True)
    assert out.cache.get_seq_length() == 12
    mask = torch.cat([given["attention_mask"], torch.ones(4, 8, dtype=torch.long)], 1)
    longer = {**given, "input_ids": out.sequences, "attention_mask": mask}
    expected = model.generate(**longer, **GREEDY)
    assert torch.equal(model.generate(**longer, cache=copy.deepcopy(out.cache), **GREEDY), expected)
    # Candidates of a smaller model, or of the text itself, are checked by this one: the tokens are the same.
    row = {name: value[:1] for name, value in given.items()}
    alone = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY, prompt_lookup_num_tokens=2), alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(model.generate(**row, **GREEDY, assistant_model=make(kind, seed=1)), alone)


@pytest.mark.parametrize("method", SEQ2SEQ)
def test_encoder_decoder_models_generate(method: str) -> None:
    model, given = adapted("t5", method), given_to("t5", method)
    expected = model.generate(**given, **GREEDY)
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**given, **GREEDY, **how), expected), how
    assert torch.equal(rows_alone(model, given, **GREEDY), expected[:, -8:])
    beams = model.generate(**given, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(**given, **GREEDY, num_beams=3, use_cache=False), beams)
    # The tokens are those that the model, called with its own answer, finds the likeliest.
    with torch.no_grad():
        logits = model(**given, decoder_input_ids=expected[:, :-1]).logits[:, -7:]
    assert torch.equal(logits.argmax(-1)[:, :3], expected[:, -7:][:, :3])


@every
@each
def test_loss_and_scores_are_of_the_users_positions(kind: str, method: str) -> None:
    model, given = adapted(kind, method), given_to(kind, method)
    ids = given["input_ids"]
    out = model(**given, labels=ids, output_hidden_states=True)
    assert out.logits.shape == (4, 5, 32) and all(h.shape == (4, 5, 16) for h in out.hidden_states)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)


# -- several on one model ----------------------------------------------------------------------------------------------


@each
def test_every_row_has_an_adapter_of_its_own(kind: str) -> None:
    groups = [["prompt", "p-mlp", "multitask", "__base__"], ["prefix", "projected", "__base__", "prefix"]]
    groups += [["adaption", "__base__", "adaption", "l"], ["multitask", "p-lstm", "multitask", "l"]]
    for names in groups:
        methods = [name for name in dict.fromkeys(names) if name not in ("__base__", "l")]
        model = adapted(kind, *methods)
        model.add_adapter("l", lora(kind))
        randomise(model, "l", seed=9)
        model.eval()
        given = {**batch(kind), **({"task_ids": TASKS} if "multitask" in names else {})}
        for how in ({}, {"num_beams": 2}, {"use_cache": False}):
            together = model.generate(**given, **GREEDY, **how, adapter_names=names)[:, -8:]
            for row, name in enumerate(names):
                own = {k: v[row : row + 1] for k, v in given.items() if k != "task_ids" or name == "multitask"}
                seen = own["attention_mask"][0].bool()
                own = {k: v[:, seen] if v.dim() == 2 else v for k, v in own.items()}
                alone = model.generate(**own, **GREEDY, **how, adapter_names=[name])[0, -8:]
                assert torch.equal(together[row], alone), (names, row, how)


@each
def test_prompts_of_other_lengths_in_one_batch(kind: str) -> None:
    for config in (PromptTuningConfig, PrefixTuningConfig, "adaption"):
        if config == "adaption":
            pair = [AdaptionPromptConfig(adapter_len=n, adapter_layers=2) for n in (3, 5)]
        else:
            pair = [config(num_virtual_tokens=n) for n in (3, 5)]  # type: ignore[operator]
        model = get_peft_model(make(kind), pair[0], "a")
        model.add_adapter("b", pair[1])
        for name in "ab":
            randomise(model, name, std=0.7)
        given, names = batch(kind), ["a", "b", "__base__", "b"]
        with torch.no_grad():
            mixed = model(**given, adapter_names=names).logits
            for row, name in enumerate(names):
                own = {k: v[row : row + 1] for k, v in given.items()}
                seen = own["attention_mask"][0].bool()
                torch.testing.assert_close(
                    mixed[row][seen], model(**own, adapter_names=[name]).logits[0][seen], **CLOSE
                )


@every
@each
def test_with_lora_trained_and_saved_together(kind: str, method: str, tmp_path: Path) -> None:
    model = adapted(kind, method)
    model.add_adapter("l", lora(kind))
    randomise(model, "l", seed=9)
    model.set_adapter([method, "l"])
    given = given_to(kind, method)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        found = gradients(model)
        assert all(g is not None and g.any() for g in found.values()) and {"lora_A"} & {n.split(".")[-1] for n in found}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(kind), tmp_path / method, method)
    loaded.load_adapter(tmp_path / "l", "l")
    loaded.set_adapter([method, "l"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, model(**given).logits, **CLOSE)
    assert torch.equal(loaded.generate(**given, **GREEDY), model.generate(**given, **GREEDY))


@each
def test_two_are_switched_and_deleted(kind: str) -> None:
    for method in CONFIGS:
        given = given_to(kind, method)
        first = adapted(kind, method)
        expected = first(**given).logits
        model = adapted(kind, method)
        model.add_adapter("other", CONFIGS[method])
        randomise(model, "other", seed=8)
        model.eval()
        assert torch.equal(model(**given).logits, expected)
        model.set_adapter("other")
        assert not torch.allclose(model(**given).logits, expected, atol=1e-3)
        model.set_adapter(method)
        model.delete_adapter("other")
        assert torch.equal(model(**given).logits, expected)
        model.delete_adapter(method)
        given.pop("task_ids", None)
        assert torch.equal(model(**given).logits, make(kind)(**given).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_two_prompts_at_once_are_one_of_both(kind: str) -> None:
    model = adapted(kind, "prompt", "p-mlp")
    model.set_adapter(["prompt", "p-mlp"])
    both = [model.get_adapter_state_dict(name)["prompt_embeddings"].detach() for name in ("prompt", "p-mlp")]
    single = get_peft_model(make(kind), PromptTuningConfig(num_virtual_tokens=2 * N)).eval()
    with torch.no_grad():
        single._peft.record("default").parameters()[0].copy_(torch.cat(both))
        given = given_to(kind, "prompt")
        given.setdefault("labels", given["input_ids"])
        torch.testing.assert_close(model(**given).logits, single(**given).logits, **CLOSE)
    given.pop("labels")
    assert torch.equal(model.generate(**given, **GREEDY), single.generate(**given, **GREEDY))


@every
def test_merging_is_refused(method: str) -> None:
    model = adapted("llama", method)
    before = model(**given_to("llama", method)).logits
    with pytest.raises(MergeError, match="cannot be expressed in the base layer's weights"):
        model.merge_and_unload()
    assert torch.equal(model(**given_to("llama", method)).logits, before)


@pytest.mark.parametrize("method", ["p-mlp", "projected", "multitask"])
def test_copies_keep_their_parts_together(method: str) -> None:
    model, given = adapted("llama", method), given_to("llama", method)
    twin = copy.deepcopy(model)
    expected = model(**given).logits
    assert torch.equal(twin(**given).logits, expected)
    randomise(twin, method, seed=9)
    assert not torch.equal(twin(**given).logits, expected) and torch.equal(model(**given).logits, expected)
    assert twin.double()(**given).logits.dtype == torch.float64


# -- training ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(kind: str, method: str, reentrant: bool) -> None:
    if (kind, method) == ("t5", "adaption"):
        return  # refused there: biases by position
    given = given_to(kind, method)
    labels = given["input_ids"]
    found = []
    for enabled in (False, True):
        model = adapted(kind, method, use_cache=False).train()
        if enabled:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)  # one method has dropout
        model(**given, labels=labels).loss.backward()
        found.append(gradients(model))
    assert found[0] and all(g.abs().sum() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("method", CONFIGS)
@each
def test_one_graph(kind: str, method: str) -> None:
    model, given = adapted(kind, method), {"input_ids": batch(kind)["input_ids"]}
    if method == "multitask":
        given["task_ids"] = TASKS
    expected = model(**given)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(**given)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    found.logits.sum().backward()
    assert all(g is not None for g in gradients(model).values())


@pytest.mark.parametrize("method", ["p-mlp", "p-lstm", "projected"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_network_is_saved_with_what_it_makes(kind: str, method: str, tmp_path: Path) -> None:
    model, given = adapted(kind, method), given_to(kind, method)
    given.setdefault("labels", given["input_ids"])
    model.save_pretrained(tmp_path)
    state = {key: value.detach().clone() for key, value in model.get_adapter_state_dict(method).items()}
    used = PeftModel.from_pretrained(make(kind), tmp_path / method, "x")
    further = PeftModel.from_pretrained(make(kind), tmp_path / method, "x", is_trainable=True)
    for loaded in (used, further):
        again = loaded.get_adapter_state_dict("x")
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
        torch.testing.assert_close(loaded(**given).loss, model(**given).loss)
    assert not gradients(used) and gradients(further).keys() == {n.replace(method, "x") for n in gradients(model)}
    # Both go on alike.
    for one in (model.eval(), further.eval()):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            one(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, value in model.get_adapter_state_dict(method).items():
        torch.testing.assert_close(further.get_adapter_state_dict("x")[key], value)
        assert not torch.equal(value, state[key])


@every
def test_a_trainer_resumes(method: str, tmp_path: Path) -> None:
    given = given_to("llama", method, rows=4)
    rows = [{name: value[i % 4] for name, value in given.items()} for i in range(8)]
    for row in rows:
        row["labels"] = row["input_ids"]

    def trainer(folder: str) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            report_to=[],
            use_cpu=True,
            seed=3,
        )
        torch.manual_seed(5)
        return Trainer(model=get_peft_model(make("llama"), CONFIGS[method]), args=arguments, train_dataset=rows)

    whole = trainer("a")
    whole.train()
    resumed = trainer("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    first, second = (t.model.get_adapter_state_dict() for t in (whole, resumed))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value)


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    model, given = adapted("llama", "multitask"), batch("llama")
    with pytest.raises(RequestError, match="this call needs task_ids"):
        model(**given)
    with pytest.raises(RequestError, match="the adapter has the tasks 0 to 2"):
        model(**given, task_ids=torch.tensor([0, 1, 2, 3]))
    model(**given, task_ids=torch.tensor([1]))  # one for all rows
    single = get_peft_model(make("llama"), MultitaskPromptTuningConfig(num_virtual_tokens=N))
    assert torch.equal(single(**given).logits, single(**given, task_ids=torch.zeros(4, dtype=torch.long)).logits)
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=N,
        prompt_tuning_init="ONLY_SOURCE_SHARED",
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
    )
    with pytest.raises(TargetError, match="adapter_model.safetensors"):
        get_peft_model(make("llama"), config)

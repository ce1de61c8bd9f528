"""Extension point E11: request arguments and the facts of a call, proved by small methods of our own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from peft_core import RequestError, get_peft_model
from tests.tiny_transformers import fresh, make
from tests.toy_plugins import net, plugin, randomise, registered
from tests.toy_requests import (
    IDS,
    PLUGINS,
    TASKS,
    PromptEdit,
    PromptEditConfig,
    SuffixConfig,
    TaskAdapter,
    TaskConfig,
    X,
    close,
    tasked,
)


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    TaskAdapter.seen.clear()
    PromptEdit.phases.clear()
    with registered(*PLUGINS):
        yield


# -- what a call is given ----------------------------------------------------------------------------------------------


def test_each_row_has_its_task() -> None:
    model = tasked()
    mixed = model(IDS, task_ids=torch.tensor(TASKS)).logits
    assert torch.equal(mixed, model(IDS, task_ids=TASKS).logits)  # lists will do
    for row, task in enumerate(TASKS):
        one = slice(row, row + 1)
        close(mixed[one], model(IDS[one], task_ids=[task]).logits)
        others = [model(IDS[one], task_ids=[other]).logits for other in range(3) if other != task]
        assert all((mixed[one] - other).abs().max() > 0.1 for other in others)
    assert torch.equal(model(IDS, task_ids=1).logits, model(IDS, task_ids=[1, 1, 1]).logits)


def test_the_base_never_sees_a_request_argument() -> None:
    model = get_peft_model(net(), TaskConfig(target_modules=["up"]))
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    assert model(X, labels=None, task_ids=TASKS).logits.shape == (3, 4)  # its forward has no **kwargs to take one
    assert model.forward(X, labels=None, task_ids=TASKS).logits.shape == (3, 4)
    assert seen == [{"labels": None}, {"labels": None}]


def test_a_call_without_its_argument_or_with_too_few_is_refused() -> None:
    model = tasked()
    with pytest.raises(RequestError, match="needs task_ids"):
        model(IDS)
    with pytest.raises(RequestError, match="2 entries, but a layer received 3 rows"):
        model(IDS, task_ids=[0, 1])
    with model.disable_adapter():
        model(IDS)


def test_the_signature_names_the_arguments_of_the_present_adapters() -> None:
    model = make("llama")
    before = inspect.signature(model.forward)
    get_peft_model(model, TaskConfig(target_modules=["q_proj"]), "a")
    names = list(inspect.signature(model.forward).parameters)
    assert names == [*list(before.parameters)[:-1], "task_ids", "kwargs"]
    model.add_adapter("b", SuffixConfig(target_modules=["q_proj"]))
    assert "invocation" in inspect.signature(model.forward).parameters
    model.delete_adapter("a")
    assert "task_ids" not in inspect.signature(model.forward).parameters
    model.unload()
    assert inspect.signature(model.forward) == before


class PositionsConfig(TaskConfig):
    """Its request argument is one that the base takes as well."""

    peft_type: ClassVar[str] = "TOYPOSITIONS"
    request_arguments: ClassVar[tuple[str, ...]] = ("position_ids",)


class PositionsAdapter(TaskAdapter):
    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs) + base.call.rows("position_ids", len(args[0]))[..., None] * self.write[0]


def test_an_argument_of_the_bases_own_goes_to_both() -> None:
    positions = torch.arange(4).expand(3, -1) * 2
    expected = make("llama")(IDS, position_ids=positions).logits
    with registered(plugin(PositionsConfig, PositionsAdapter)):
        model = get_peft_model(make("llama"), PositionsConfig(target_modules=["q_proj"]))
        assert torch.equal(model(IDS, position_ids=positions).logits, expected)
        assert (randomise(model)(IDS, position_ids=positions).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_gives_each_row_its_task(kind: str, beams: int) -> None:
    model = tasked(kind)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    mask = torch.ones_like(IDS)
    mask[1, 0] = mask[2, :2] = 0
    TaskAdapter.seen.clear()
    mixed = model.generate(input_ids=IDS, attention_mask=mask, task_ids=TASKS, **options)
    if kind == "t5":  # the encoder runs once, and the decoder on every beam
        sizes = {(path.partition(".")[0], size) for path, size in TaskAdapter.seen}
        assert sizes == {("encoder", 3), ("decoder", 3 * beams)}
    other = model.generate(input_ids=IDS, attention_mask=mask, task_ids=[0, 1, 2], **options)
    assert not torch.equal(mixed, other)
    for row, task in enumerate(TASKS):
        one = {"input_ids": IDS[row : row + 1], "attention_mask": mask[row : row + 1], "task_ids": [task]}
        assert torch.equal(model.generate(**one, **options)[0], mixed[row])


def test_together_with_an_adapter_for_each_row() -> None:
    model = tasked()
    model.add_adapter("other", TaskConfig(target_modules=["q_proj"]))
    randomise(model, "other", seed=2)
    names = ["other", "default", "__base__"]
    given = {"adapter_names": names, "task_ids": TASKS}
    mixed = model(IDS, **given).logits
    for row, name in enumerate(names):
        close(mixed[row], model(IDS, adapter_names=[name] * 3, task_ids=TASKS).logits[row])
        one = {"adapter_names": [name], "task_ids": TASKS[row : row + 1]}
        close(mixed[row], model(IDS[row : row + 1], **one).logits[0])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    beams = model.generate(IDS, **given, **options)
    for row, name in enumerate(names):
        one = {"adapter_names": [name], "task_ids": TASKS[row : row + 1]}
        assert torch.equal(model.generate(IDS[row : row + 1], **one, **options)[0], beams[row])


# -- what sites know of the call ---------------------------------------------------------------------------------------


def test_a_fact_of_the_prompt_is_carried_through_the_generation() -> None:
    model = randomise(get_peft_model(make("llama"), SuffixConfig(target_modules=["q_proj", "v_proj"])), std=1.0)
    invocation = [7, 3, 99]  # the last row has none
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(IDS, invocation=invocation, **options)
    with model.disable_adapter():
        plain = model.generate(IDS, **options)
    assert torch.equal(cached[2], plain[2])
    ids = IDS[:2]
    for _ in range(5):  # the position is found in the whole sequence, each time anew
        ids = torch.cat([ids, model(ids, invocation=invocation[:2]).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached[:2], ids)
    assert not torch.equal(cached[:2], plain[:2])
    beams = model.generate(IDS, invocation=invocation, num_beams=2, **options)
    for row in range(3):
        alone = model.generate(IDS[row : row + 1], invocation=invocation[row : row + 1], num_beams=2, **options)
        assert torch.equal(alone[0], beams[row])


def test_t11_sites_know_the_phase_and_the_cached_length() -> None:
    model = randomise(get_peft_model(make("llama"), PromptEditConfig()), std=10.0)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    PromptEdit.phases.clear()
    cached = model.generate(IDS, **options)
    assert PromptEdit.phases == [("prefill", 0), ("decode", 4), ("decode", 5), ("decode", 6)]
    PromptEdit.phases.clear()
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    assert PromptEdit.phases == [("prefill", 0)] * 4
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(IDS, **options))
    PromptEdit.phases.clear()
    model(IDS)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert PromptEdit.phases == [("score", 0), ("train", 0)]
    PromptEdit.phases.clear()
    assert torch.equal(cached, model.generate(IDS, **options))  # it has no dropout, and samples for training
    assert PromptEdit.phases[1] == ("decode", 4)


def test_the_encoder_of_a_generation_knows_the_inputs() -> None:
    found: list[Any] = []

    class Spy(TaskAdapter):
        def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
            if self.layer.path.startswith("encoder"):
                found.append(base.call.inputs)
            return super().forward(base, *args, **kwargs)

    class SpyConfig(TaskConfig):
        peft_type: ClassVar[str] = "TOYSPY"

    with registered(plugin(SpyConfig, Spy)):
        model = get_peft_model(make("t5"), SpyConfig(target_modules=["q"]))
        for call in (
            lambda: model.generate(IDS, attention_mask=torch.ones_like(IDS), task_ids=TASKS, max_new_tokens=2),
            lambda: model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), task_ids=0, max_new_tokens=2),
        ):
            found.clear()
            call()
            assert found and all(set(inputs) == {"input_ids", "attention_mask"} for inputs in found)
            assert torch.equal(found[0]["input_ids"], IDS)


# -- training ----------------------------------------------------------------------------------------------------------


def test_t15_trainer_keeps_the_column(tmp_path: Path) -> None:
    from datasets import Dataset

    from tests.trainer_scenarios import strict_warnings, trainer

    ids = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    tasks = [0, 2, 2, 0, 0, 2, 2, 0]  # nobody has the task 1
    data = Dataset.from_dict({"text": ["..."] * 8, "input_ids": ids, "labels": ids, "task_ids": tasks})
    model = get_peft_model(fresh("llama"), TaskConfig(target_modules=["q_proj"]))
    write = model._peft.sites["model.layers.0.self_attn.q_proj"].of("default")[""].write
    with strict_warnings():
        run = trainer(model, tmp_path, data)
        assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "labels", "task_ids"}
        run.train()
        assert write[0].abs().sum() > 0 and write[2].abs().sum() > 0
        assert torch.equal(write[1], torch.zeros_like(write[1]))
        assert run.evaluate()["eval_loss"] > 0

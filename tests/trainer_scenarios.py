"""What transformers' `Trainer`, unmodified, must do with our models. Run in process and, without HF PEFT, by path.

Each scenario is a function of a scratch directory that asserts. `main` runs all of them and prints one JSON line per
scenario: its name, and null or the traceback.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_core import CheckpointError, PeftModel, get_peft_model, get_peft_model_state_dict, load_method
from tests.tiny_transformers import VOCABULARY, fresh

State = dict[str, Tensor]
SCENARIOS: dict[str, Callable[[Path], None]] = {}

LENGTH = 6

# What a checkpoint holds beside the adapter: Trainer's own files.
TRAINERS_FILES = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
ADAPTERS_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def scenario(function: Callable[[Path], None]) -> Callable[[Path], None]:
    SCENARIOS[function.__name__] = function
    return function


# -- models, data, runs ------------------------------------------------------------------------------------------------


def llama(dropout: float = 0.0) -> nn.Module:
    return fresh("llama", attention_dropout=dropout)


def bert(dropout: float = 0.0) -> nn.Module:
    return fresh("bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def lora(**fields: Any) -> Any:
    return load_method("lora")(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **fields})


def ia3(**fields: Any) -> Any:
    return load_method("ia3")(task_type="CAUSAL_LM", **fields)


def adapt(model: nn.Module, config: Any, name: str = "default", seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, config, name)


def randomise(model: Any, name: str = "default") -> None:
    """Values other than those of the start, under which no adapter is a bystander."""
    with torch.no_grad():
        for parameter in model._peft.adapters[name].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def sentences(rows: int = 8) -> Dataset:
    """For causal models; two columns are no argument of any model."""
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    ones = [[1] * LENGTH] * rows
    return Dataset.from_dict(
        {"text": ["..."] * rows, "input_ids": ids, "attention_mask": ones, "labels": ids, "length": [LENGTH] * rows}
    )


def labelled(rows: int = 8) -> Dataset:
    """For classifiers."""
    data = sentences(rows).remove_columns("labels")
    return data.add_column("labels", [row % 3 for row in range(rows)])


def trainer(model: Any, scratch: Path, data: Dataset, *, callbacks: Any = None, **arguments: Any) -> Trainer:
    """Four optimizer steps of two rows, a checkpoint after each other one."""
    given = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        **arguments,
    }
    return Trainer(model, TrainingArguments(**given), train_dataset=data, eval_dataset=data, callbacks=callbacks)


def state(model: Any, name: str = "default") -> State:
    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


def difference(first: State, second: State) -> float:
    assert first.keys() == second.keys() and first
    return max(float((a - second[key]).abs().max()) for key, a in first.items())


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def resumes_exactly(make: Callable[[int], Any], scratch: Path, data: Dataset, **arguments: Any) -> Any:
    """Train through; then train a second model, built with another seed, from the first's middle checkpoint on."""
    whole, again = make(1), make(2)
    for name in whole.peft_config:
        # Training must be what makes them equal.
        assert name == "ia3" or difference(state(whole, name), state(again, name)) > 0
    base = {key: value.clone() for key, value in whole.base_state_dict().items()}
    start = {name: state(whole, name) for name in whole.peft_config}
    trainer(whole, scratch / "whole", data, **arguments).train()
    trainer(again, scratch / "again", data, **arguments).train(
        resume_from_checkpoint=str(scratch / "whole/checkpoint-2")
    )
    for name in whole.peft_config:
        assert difference(start[name], state(whole, name)) > 0, f"{name} was not trained"
        assert difference(state(whole, name), state(again, name)) == 0.0
    assert all(torch.equal(value, base[key]) for key, value in whole.base_state_dict().items())
    return whole


# -- scenarios ---------------------------------------------------------------------------------------------------------


@scenario
def checkpoints_hold_the_adapter_alone(scratch: Path) -> None:
    model = adapt(llama(), lora())
    run = trainer(model, scratch, sentences())
    run.train()
    assert files(scratch / "checkpoint-4") == TRAINERS_FILES | ADAPTERS_FILES
    weights = scratch / "checkpoint-4/adapter_model.safetensors"
    numbers = 2 * 4 * ((16 + 16) + (16 + 8))  # layers x rank x (query's in and out + value's)
    assert model.get_nb_trainable_parameters()[0] == numbers
    # Eight tensors of float32; the names, shapes and the config of the header.
    assert 4 * numbers < weights.stat().st_size < 4 * numbers + 4096
    run.save_model(str(scratch / "final"))
    assert files(scratch / "final") == {*ADAPTERS_FILES, "training_args.bin"}
    fresh = PeftModel.from_pretrained(llama(), scratch / "final")
    assert difference(state(fresh), state(model)) == 0.0


@scenario
def resume_is_exact(scratch: Path) -> None:
    resumes_exactly(lambda seed: adapt(llama(), lora(), seed=seed), scratch, sentences())


@scenario
def resume_is_exact_with_dropout(scratch: Path) -> None:
    resumes_exactly(lambda seed: adapt(llama(0.2), lora(lora_dropout=0.3), seed=seed), scratch, sentences())


@scenario
def resume_is_exact_for_a_scaling_method(scratch: Path) -> None:
    resumes_exactly(lambda seed: adapt(llama(0.2), ia3(), "ia3", seed=seed), scratch, sentences())


@scenario
def resume_is_exact_for_a_named_adapter(scratch: Path) -> None:
    resumes_exactly(lambda seed: adapt(llama(), lora(), "mine", seed=seed), scratch, sentences())
    assert files(scratch / "whole/checkpoint-4") == TRAINERS_FILES | {f"mine/{name}" for name in ADAPTERS_FILES}


@scenario
def resume_is_exact_for_two_adapters(scratch: Path) -> None:
    def make(seed: int) -> Any:
        model = adapt(llama(), lora(), seed=seed)
        model.add_adapter("ia3", ia3())
        model.set_adapter(["default", "ia3"])
        return model

    model = resumes_exactly(make, scratch, sentences())
    assert model.active_adapters == ["default", "ia3"]
    assert files(scratch / "whole/checkpoint-4") == (
        TRAINERS_FILES | ADAPTERS_FILES | {f"ia3/{name}" for name in ADAPTERS_FILES}
    )


@scenario
def an_inactive_adapter_is_kept_as_it_is(scratch: Path) -> None:
    def make(seed: int) -> Any:
        model = adapt(llama(), lora(), seed=seed)
        model.add_adapter("other", lora(r=2))
        return model

    first, second = make(1), make(2)
    before = state(first, "other")
    trainer(first, scratch / "first", sentences()).train()
    assert difference(before, state(first, "other")) == 0.0
    checkpoint = str(scratch / "first/checkpoint-2")
    trainer(second, scratch / "second", sentences()).train(resume_from_checkpoint=checkpoint)
    assert difference(state(first), state(second)) == 0.0
    assert difference(before, state(second, "other")) == 0.0
    assert second.active_adapters == ["default"]
    assert not any(p.requires_grad for p in second._peft.adapters["other"].parameters())


@scenario
def resume_is_exact_with_a_users_optimizer(scratch: Path) -> None:
    """It was made before the checkpoint is loaded: the adapter's tensors must stay the same objects."""

    def run(seed: int, name: str) -> tuple[Any, Trainer]:
        model = adapt(llama(), lora(), seed=seed)
        ours = trainer(model, scratch / name, sentences())
        weights = [p for p in model.parameters() if p.requires_grad]
        ours.optimizer = torch.optim.AdamW(weights, lr=0.05)
        return model, ours

    whole, first = run(1, "whole")
    first.train()
    again, second = run(2, "again")
    second.train(resume_from_checkpoint=str(scratch / "whole/checkpoint-2"))
    assert difference(state(whole), state(again)) == 0.0


@scenario
def a_trained_head_is_in_the_checkpoint(scratch: Path) -> None:
    def make(seed: int) -> Any:
        fields = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        return adapt(bert(0.1), lora(**fields), seed=seed)

    model = make(1)
    head = "base_model.model.classifier.weight"
    before = state(model)[head]
    resumes_exactly(make, scratch, labelled())
    fresh = PeftModel.from_pretrained(bert(), scratch / "whole/checkpoint-4")
    assert head in state(fresh) and float((state(fresh)[head] - before).abs().max()) > 0


class Snapshots(TrainerCallback):
    """The adapters' tensors as they were at each save."""

    def __init__(self) -> None:
        self.taken: dict[int, dict[str, State]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.taken[state.global_step] = {name: globals()["state"](model, name) for name in model.peft_config}


def best_comes_back(model: Any, scratch: Path, data: Dataset) -> Trainer:
    """Evaluate and save after each step, and call the highest loss the best: it is that of the first checkpoint."""
    snapshots = Snapshots()
    run = trainer(
        model,
        scratch,
        data,
        callbacks=[snapshots],
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        learning_rate=0.01,
        lr_scheduler_type="constant",
    )
    run.train()
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-1")
    assert run.state.best_global_step == 1
    for name in model.peft_config:
        assert difference(snapshots.taken[1][name], snapshots.taken[4][name]) > 0
        assert difference(snapshots.taken[1][name], state(model, name)) == 0.0
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    return run


@scenario
def the_best_model_comes_back(scratch: Path) -> None:
    best_comes_back(adapt(llama(), lora()), scratch, sentences())


@scenario
def the_best_model_comes_back_with_head_and_two_named_adapters(scratch: Path) -> None:
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["classifier"]}
    model = adapt(bert(), lora(**fields), "mine")
    model.add_adapter("ia3", load_method("ia3")(task_type="TOKEN_CLS"))
    model.set_adapter(["mine", "ia3"])
    best_comes_back(model, scratch, labelled())
    assert {n for n in model.peft_config for p in model._peft.adapters[n].parameters() if p.requires_grad} == {
        "mine",
        "ia3",
    }


@scenario
def training_goes_on_after_the_best_model_came_back(scratch: Path) -> None:
    """The optimizer still holds the adapter's tensors."""
    model = adapt(llama(), lora())
    run = best_comes_back(model, scratch, sentences())
    before = state(model)
    run.args.load_best_model_at_end = False
    run.train()
    assert difference(before, state(model)) > 0


@scenario
def label_smoothing_shifts_the_labels(scratch: Path) -> None:
    """Trainer decides by the class's name whether logits are one position ahead of labels."""
    plain, adapted = llama(), adapt(llama(), lora())
    losses = []
    for index, model in enumerate((plain, adapted)):
        run = trainer(model, scratch / str(index), sentences(), label_smoothing_factor=0.1)
        batch = next(iter(run.get_train_dataloader()))
        labels = batch["labels"]
        losses.append(float(run.compute_loss(model, dict(batch)).detach()))
    with torch.no_grad():
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
        unshifted = float(run.label_smoother(outputs, labels))
    # A fresh adapter adds zeros; the projections see their rows flattened.
    assert abs(losses[0] - losses[1]) < 1e-6
    assert abs(losses[0] - unshifted) > 1e-3


@scenario
def columns_and_labels_are_those_of_the_model(scratch: Path) -> None:
    for model, data in ((llama(), sentences()), (bert(), labelled())):
        adapted = adapt(model, lora(target_modules="all-linear", task_type=None))
        run = trainer(adapted, scratch, data)
        assert run.label_names == ["labels"]
        assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}
        metrics = run.evaluate()
        assert metrics["eval_loss"] > 0
        predictions = run.predict(data)
        assert len(predictions.predictions) == len(data) and predictions.label_ids is not None


@scenario
def activation_checkpointing_changes_nothing(scratch: Path) -> None:
    ends = []
    for reentrant in (None, True, False):
        arguments: dict[str, Any] = {}
        if reentrant is not None:
            arguments = {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
        model = adapt(llama(0.2), lora(lora_dropout=0.3))
        trainer(model, scratch / str(reentrant), sentences(), **arguments).train()
        ends.append(state(model))
    # The same numbers by the same kernels, dropout masks included.
    assert difference(ends[0], ends[1]) == 0.0 and difference(ends[0], ends[2]) == 0.0


@scenario
def a_half_precision_base_trains(scratch: Path) -> None:
    def make(seed: int) -> Any:
        return adapt(llama().to(torch.bfloat16), lora(), seed=seed)

    model = resumes_exactly(make, scratch, sentences())
    assert {tensor.dtype for tensor in state(model).values()} == {torch.float32}
    assert {tensor.dtype for tensor in model.base_state_dict().values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in state(model).values())


@scenario
def mixed_precision_trains(scratch: Path) -> None:
    resumes_exactly(lambda seed: adapt(llama(), lora(), seed=seed), scratch, sentences(), bf16=True)


@scenario
def a_model_without_adapters_is_left_alone(scratch: Path) -> None:
    """The two steps of Trainer that load our adapters are what they were for every other model."""
    adapt(llama(), lora())  # installs them
    plain = llama()
    snapshot: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshot.update({k: v.clone() for k, v in plain.state_dict().items()} if state.global_step == 2 else {})

    run = trainer(plain, scratch, sentences(), callbacks=[Keep()])
    run.train()
    assert (scratch / "checkpoint-2/model.safetensors").is_file()
    assert any(not torch.equal(value, snapshot[key]) for key, value in plain.state_dict().items())
    run._load_from_checkpoint(str(scratch / "checkpoint-2"))
    assert all(torch.equal(value, snapshot[key]) for key, value in plain.state_dict().items())


@scenario
def a_checkpoint_that_lacks_an_adapter_is_refused(scratch: Path) -> None:
    trainer(adapt(llama(), lora()), scratch / "one", sentences()).train()
    model = adapt(llama(), lora())
    model.add_adapter("second", ia3())
    before = {name: state(model, name) for name in model.peft_config}
    resumed = trainer(model, scratch / "two", sentences())
    with pytest.raises(CheckpointError, match="second"):
        resumed.train(resume_from_checkpoint=str(scratch / "one/checkpoint-2"))
    for name, tensors in before.items():
        assert difference(tensors, state(model, name)) == 0.0


# -- running -----------------------------------------------------------------------------------------------------------


@contextmanager
def strict_warnings() -> Iterator[None]:
    """Warnings are errors, but for those of third parties that no caller can avoid."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def main(scratch: Path) -> None:
    """Run everything where HF PEFT is not installed."""
    import importlib.util

    from transformers.utils import is_peft_available

    assert importlib.util.find_spec("peft") is None and not is_peft_available(), "HF PEFT is within reach"
    torch.set_num_threads(1)
    for name, run in SCENARIOS.items():
        where = scratch / name
        where.mkdir(parents=True)
        error = None
        try:
            with strict_warnings():
                torch.manual_seed(0)
                run(where)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps([name, error]), flush=True)

"""AdaLoRA under transformers' `Trainer`: nothing to call, and a resumed run ends with the same ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core import load_method
from peft_lora import rank_history
from tests.trainer_scenarios import adapt, llama, sentences, state, strict_warnings, trainer


def config(**options: Any) -> Any:
    fields = {"init_r": 3, "target_r": 1, "total_step": 8, "target_modules": ["q_proj", "v_proj"], **options}
    return load_method("adalora")(task_type="CAUSAL_LM", **fields)


def ended(model: Any) -> dict[str, tuple[bool, ...]]:
    pattern = model.peft_config["default"].rank_pattern
    assert pattern is not None
    return pattern


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpoint", [2, 6])
def test_resume_is_exact(accumulation: int, checkpoint: int, tmp_path: Path) -> None:
    arguments = {"max_steps": 8, "gradient_accumulation_steps": accumulation}
    with strict_warnings():
        whole, again = (adapt(llama(), config(tfinal=3), seed=seed) for seed in (1, 2))
        trainer(whole, tmp_path / "whole", sentences(), **arguments).train()
        trainer(again, tmp_path / "again", sentences(), **arguments).train(
            resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{checkpoint}")
        )
    assert ended(again) == ended(whole)
    assert sum(map(sum, ended(whole).values())) == len(ended(whole))
    mine, other = state(whole), state(again)
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in mine.items())
    assert rank_history(whole)[-1][1] == {key.removesuffix(".lora_E"): sum(rows) for key, rows in ended(whole).items()}


def test_the_last_checkpoint_is_pruned_and_can_be_trained_on(tmp_path: Path) -> None:
    """Adapter and optimizer are saved after the last step, and both are cut."""
    with strict_warnings():
        model = adapt(llama(), config(total_step=4))
        trainer(model, tmp_path, sentences()).train()
        again = adapt(llama(), config(total_step=4), seed=2)
        trainer(again, tmp_path / "more", sentences(), max_steps=6).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    assert ended(again) == ended(model)
    assert any(not torch.equal(tensor, state(again)[key]) for key, tensor in state(model).items())

"""The benchmark runs, and what it counts (not what it times) is what is promised."""

from __future__ import annotations

import pytest
import torch

from benchmarks import lora, lora_family


# HF PEFT asks the model for a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4.0), (torch.bfloat16, 6.0)])
def test_a_step_costs_four_operations_more_and_keeps_what_the_floor_keeps(dtype: torch.dtype, most: float) -> None:
    rows = {line.split()[0]: line.split()[-3:] for line in lora.step(dtype, 1).splitlines()[2:]}
    ours, floor = rows["ours"], rows["floor"]
    assert float(ours[1]) <= most < float(floor[1])
    assert float(ours[2]) <= float(floor[2])
    assert float(rows["base"][1]) == float(rows["base"][2]) == 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("method", lora_family.OPTIONS)
def test_the_family_costs_less_and_keeps_no_more_than_its_floor(method: str) -> None:
    rows = {line.split()[0]: line.split()[-3:] for line in lora_family.step(method, torch.bfloat16, 1).splitlines()[2:]}
    ours, floor, hf = rows["ours"], rows["floor"], rows["HF"]
    assert float(ours[1]) < float(floor[1])
    assert float(ours[2]) <= float(floor[2]) < float(hf[2]) / 3

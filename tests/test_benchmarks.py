"""The benchmark runs, and what it counts (not what it times) is what is promised."""

from __future__ import annotations

import pytest
import torch

from benchmarks import lora


# HF PEFT asks the model for a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4.0), (torch.bfloat16, 6.0)])
def test_a_step_costs_four_operations_more_and_keeps_what_the_floor_keeps(dtype: torch.dtype, most: float) -> None:
    rows = {line.split()[0]: line.split()[-3:] for line in lora.step(dtype, 1).splitlines()[2:]}
    ours, floor = rows["ours"], rows["floor"]
    assert float(ours[1]) <= most < float(floor[1])
    assert float(ours[2]) <= float(floor[2])
    assert float(rows["base"][1]) == float(rows["base"][2]) == 0

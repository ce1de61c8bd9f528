"""The benchmark of OFT and BOFT runs, and what it counts (not what it times) is what is promised."""

from __future__ import annotations

import pytest
import torch

from benchmarks import orthogonal


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning")
@pytest.mark.parametrize("case", orthogonal.CASES)
def test_a_step_keeps_for_backward_what_the_floor_keeps(case: str) -> None:
    rows = {line.split()[0]: line.split()[-3:] for line in orthogonal.step(case, torch.bfloat16, 1).splitlines()[2:]}
    ours, floor = rows["ours"], rows["floor"]
    assert float(ours[1]) <= 1.1 * float(floor[1])
    assert float(ours[2]) <= 1.2 * float(floor[2])
    assert float(rows["base"][1]) == float(rows["base"][2]) == 0

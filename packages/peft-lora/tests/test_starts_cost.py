"""What a start that is subtracted costs in each call, in exact counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lora_by_hand import Recorder, kept_for_backward, operations
from torch import nn

from peft_core import get_peft_model
from peft_lora import LoraConfig

SMALL = 32 * 4 * 2  # entries of [A; A0] and of [B, B0]


def model(start: bool | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32)).to(dtype)
    return (
        base if start is True else get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=start))
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pair_of_products_and_four_small_operations(dtype: torch.dtype, training: bool) -> None:
    """B - B0, A - A0, [A0; A - A0], [B - B0, B]; then LoRA: two transposes, two products, perhaps two casts."""
    x = torch.randn(200, 32, dtype=dtype)
    bare, adapted = model(True, dtype), model("pissa", dtype).train(training)
    found = Counter(operations(lambda: adapted(x)))
    found.subtract(operations(lambda: bare(x)))
    casts = {"_to_copy": 2} if dtype == torch.bfloat16 else {}
    assert dict(+found) == {"add": 1, "sub": 1, "cat": 2, "t": 2, "mm": 1, "addmm": 1, **casts}
    with Recorder() as recorder:
        adapted(x)
    # Nothing of the input's or the weight's size is made but the two outputs, of the base and of the sum.
    assert sorted(n for n in recorder.made if n > SMALL) == sorted([200 * 8, 200 * 32, 200 * 32])


def test_what_is_kept_for_backward() -> None:
    """The input, the narrow product, and [B - B0, B]; no copy of the input, no weight."""
    x = torch.randn(200, 32)
    adapted = model("olora")
    with kept_for_backward() as kept:
        adapted(x)
    assert sorted(kept.values()) == sorted(4 * n for n in (200 * 32, 200 * 8, SMALL))


def test_starts_that_leave_the_base_cost_what_lora_costs() -> None:
    x = torch.randn(200, 32)
    one, other = model("mica"), model("gaussian")
    assert operations(lambda: one(x)) == operations(lambda: other(x))

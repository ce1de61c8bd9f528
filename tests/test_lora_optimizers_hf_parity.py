"""LoRA+ and LoRA-FA take the steps of HF PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import optimizers
from torch import nn

from peft_core import get_peft_model, get_peft_model_state_dict
from peft_lora import LoraConfig, create_lorafa_optimizer, create_loraplus_optimizer

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
# Double precision; A Aᵀ is inverted with a regulariser of 1e-8, which leaves about half of the digits.
ATOL = 1e-8
SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], "init_lora_weights": False}
MAKERS = {
    "LoRA+": lambda library, model: library.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4, loraplus_weight_decay=0.1
    ),
    "LoRA-FA": lambda library, model: library.create_lorafa_optimizer(
        model, r=2, lora_alpha=3, lr=0.01, weight_decay=0.1
    ),
}


class Ours:
    create_loraplus_optimizer = staticmethod(create_loraplus_optimizer)
    create_lorafa_optimizer = staticmethod(create_lorafa_optimizer)


@pytest.mark.parametrize("which", MAKERS)
def test_the_same_steps(which: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**SETTINGS))
    ours = get_peft_model(base, LoraConfig(**SETTINGS))
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    start = {key: value.detach().clone() for key, value in get_peft_model_state_dict(ours).items()}
    pairs = [(model, MAKERS[which](library, model)) for library, model in ((Ours, ours), (optimizers, theirs))]
    for model, optimizer in pairs:
        for _ in range(3):
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = peft.get_peft_model_state_dict(theirs)
    moved = 0
    for key, value in get_peft_model_state_dict(ours).items():
        moved += not torch.equal(value, start[key])
        torch.testing.assert_close(value, expected[key], rtol=0, atol=ATOL)
    assert moved == (4 if which == "LoRA+" else 2)

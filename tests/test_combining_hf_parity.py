"""`add_weighted_adapter` against HF PEFT: the same adapters, weights and options give the same outputs."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from peft_core import get_peft_model, get_peft_model_state_dict
from peft_lora import LoraConfig, convert_to_lora

NAMES, WEIGHTS = ["first", "second", "third"], [0.7, -0.4, 1.3]
TARGETS = ["embedding", "lower", "upper"]
IDS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.lower = nn.Linear(12, 16)
        self.upper = nn.Linear(16, 8)

    def forward(self, ids):
        return self.upper(torch.relu(self.lower(self.embedding(ids))))


def both(ranks):
    """Our model and HF's, with the same three adapters; their scalings differ too."""
    torch.manual_seed(0)
    ours = Net()
    theirs = None
    for name, rank in zip(NAMES, ranks, strict=True):
        settings = {"r": rank, "lora_alpha": 2 * rank + len(name), "target_modules": TARGETS}
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(**settings), name)
            get_peft_model(ours, LoraConfig(**settings), name)
        else:
            theirs.add_adapter(name, peft.LoraConfig(**settings))
            ours.add_adapter(name, LoraConfig(**settings))
        for parameter in ours._peft.adapters[name].parameters():
            parameter.data.normal_()
        peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours, adapter_name=name), name)
    return ours.eval(), theirs.eval()


WAYS = [
    ("cat", "cat", {}),
    ("svd", "svd", {"svd_rank": 5}),
    ("svd", "svd", {"svd_rank": 3, "svd_clamp": 0.8}),
    ("ties_svd", "ties_svd", {"svd_rank": 8, "density": 0.4}),
    ("ties_svd", "ties_svd", {"svd_rank": 8, "density": 0.4, "majority_sign_method": "frequency"}),
    ("magnitude_prune_svd", "magnitude_prune_svd", {"svd_rank": 8, "density": 0.3}),
]
FACTORS = [
    ("linear_factors", "linear", {}),
    ("ties_factors", "ties", {"density": 0.5}),
    ("magnitude_prune_factors", "magnitude_prune", {"density": 0.5}),
]


@pytest.mark.parametrize(
    ("how", "theirs", "options", "ranks"),
    [(*way, (4, 4, 4)) for way in WAYS + FACTORS] + [(*way, (2, 4, 3)) for way in WAYS],  # factors need equal ranks
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_as_hf(how, theirs, options, ranks):
    ours, hf = both(ranks)
    ours.add_weighted_adapter(NAMES, WEIGHTS, "new", how, **options)
    hf.add_weighted_adapter(NAMES, WEIGHTS, "new", theirs, **options)
    ours.set_adapter("new")
    hf.set_adapter("new")
    with torch.no_grad():
        found, expected = ours(IDS), hf(IDS)
    # Float32, and two decompositions that sum in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_conversion_loads_in_hf():
    ours, _ = both((4, 4, 4))
    ours.set_adapter(["first", "second"])
    config, tensors = convert_to_lora(ours, 4, "second")
    hf = peft.get_peft_model(
        Net(), peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=list(config.target_modules))
    )
    with torch.no_grad():
        for path in TARGETS:
            hf.get_base_model().get_submodule(path).base_layer.load_state_dict(
                {k.removeprefix(f"{path}."): v for k, v in ours.base_state_dict().items() if k.startswith(path)}
            )
    peft.set_peft_model_state_dict(hf, tensors)
    ours.set_adapter("second")
    with torch.no_grad():
        expected = ours(IDS)
        torch.testing.assert_close(hf.eval()(IDS), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))

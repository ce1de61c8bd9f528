"""What LoRA costs, in exact counts: operations, bytes kept for backward, and no dense ΔW."""

from __future__ import annotations

import pytest
import torch
from lora_by_hand import Recorder, kept_for_backward, operations, site_with
from torch import Tensor, nn

from peft_core import get_peft_model
from peft_lora import LoraConfig


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 6)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_linear_layer_costs_at_most_four_operations_more(dtype: torch.dtype, most: int, training: bool) -> None:
    """Two transposes, two products; two casts where the base is half precision and the adapter is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x = torch.randn(2, 3, 16, dtype=dtype)
    model = Net().to(dtype)
    plain = operations(lambda: model(x))
    get_peft_model(model, LoraConfig(r=4, target_modules=["layer"]))
    model.train(training)
    found = operations(lambda: model(x))
    extra = list(found)
    for name in plain:
        extra.remove(name)
    assert len(found) - len(plain) <= most, extra
    wanted = ["t", "t", "mm", "addmm"] + ["_to_copy"] * (2 if dtype == torch.bfloat16 else 0)
    # Views aside: the base's own flattening and ours are not the same operation.
    views = ("view", "_unsafe_view", "reshape")
    assert sorted(n for n in extra if n not in views) == sorted(wanted)


def test_without_dropout_there_is_no_dropout_module() -> None:
    _, adapter = site_with(nn.Linear(4, 4))
    assert not any(isinstance(m, (nn.Dropout, nn.Identity)) for m in adapter.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_x_itself_and_no_copy(dtype: torch.dtype) -> None:
    """Kept are x, the small product, and the factors: no second x, nothing of the output's or the weight's size."""
    rows, width, out, r = 64, 32, 48, 4
    site, adapter = site_with(nn.Linear(width, out).to(dtype))
    x = torch.randn(rows, width, dtype=dtype)
    with kept_for_backward() as kept:
        site(x)
    assert x.untyped_storage().data_ptr() in kept
    factors = adapter.lora_A.numel() + adapter.lora_B.numel()
    most = (x.numel() + rows * r + factors) * x.element_size()
    assert sum(kept.values()) <= most


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_training_step_forms_no_dense_delta(dora: bool) -> None:
    """No operation of forward and backward makes a tensor of the weight's size."""
    width, out = 96, 80
    site, adapter = site_with(nn.Linear(width, out), use_dora=dora)
    x = torch.randn(4, width, requires_grad=True)
    if dora:
        site(x)  # the weight's own row norms, which are computed once, are reduced from the weight
    with Recorder() as recorder:
        site(x).sum().backward()
    assert max(recorder.made) < width * out
    assert adapter.training is site.training


def test_dora_takes_the_norms_of_the_base_once() -> None:
    """Later steps read the base's weight for products alone; a change of the weight is seen."""
    site, adapter = site_with(nn.Linear(12, 8), use_dora=True)
    x = torch.randn(3, 12)
    first = operations(lambda: site(x))
    later = operations(lambda: site(x))
    assert "linalg_vector_norm" in first
    assert "linalg_vector_norm" not in later
    with torch.no_grad():
        site.base_layer.weight.mul_(2)
    assert "linalg_vector_norm" in operations(lambda: site(x))
    site.base_layer.weight = nn.Parameter(torch.randn(8, 12), requires_grad=False)
    assert "linalg_vector_norm" in operations(lambda: site(x))
    expected = adapter.merge({"weight": site.base_layer.weight})["weight"]
    # float32, twelve terms; rows are rescaled.
    torch.testing.assert_close(site(x), x @ expected.t() + site.base_layer.bias, rtol=1e-5, atol=1e-5)

"""DoRA: equation 5 of the paper, its constant norm, its dropout, and its company."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lora_by_hand import gap, merged, site_with
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_core import get_peft_model
from peft_core.errors import ConfigError, TargetError
from peft_lora import LoraConfig

EXACT = 1e-12  # float64; norms by the expansion lose a digit or two against norms of the sum
S = 6 / 4


def expected_weight(weight: Tensor, delta: Tensor, magnitude: Tensor, axis: tuple[int, ...]) -> Tensor:
    """m / ‖W + ΔW‖ · (W + ΔW), the norm a constant."""
    whole = weight + delta
    norm = whole.pow(2).sum(axis, keepdim=True).sqrt().detach()
    return magnitude.view(norm.shape) / norm * whole


@pytest.mark.parametrize("kind", ["linear", "no-bias", "conv1d"])
def test_linear(kind: str) -> None:
    torch.manual_seed(0)
    module = (Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind == "linear")).double()
    if module.bias is not None:
        nn.init.normal_(module.bias)
    site, adapter = site_with(module, use_dora=True)
    assert adapter.lora_magnitude_vector.shape == (7,)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = module.weight.t() if kind == "conv1d" else module.weight
    delta = S * adapter.lora.lora_B @ adapter.lora.lora_A
    expected = F.linear(x, expected_weight(weight, delta, adapter.lora_magnitude_vector, (1,)), module.bias)
    compare(site, adapter, expected, x)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}], ids=str)
def test_convolution(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 5, 3, **options).double()  # type: ignore[arg-type]
    site, adapter = site_with(module, use_dora=True)
    assert adapter.lora_magnitude_vector.shape == (1, 5, 1, 1)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    delta = S * torch.einsum("or,rikl->oikl", adapter.lora.lora_B.flatten(1), adapter.lora.lora_A)
    weight = expected_weight(module.weight, delta, adapter.lora_magnitude_vector, (1, 2, 3))
    compare(site, adapter, torch.func.functional_call(copy.deepcopy(module), {"weight": weight}, (x,)), x)


def test_embedding() -> None:
    """Norms are over the vocabulary, one for each feature."""
    torch.manual_seed(0)
    module = nn.Embedding(9, 6).double()
    site, adapter = site_with(module, use_dora=True)
    assert adapter.lora_magnitude_vector.shape == (6,)
    lora = adapter.lora
    delta = S * (lora.lora_embedding_B @ lora.lora_embedding_A).t()
    table = expected_weight(module.weight, delta, adapter.lora_magnitude_vector, (0,))
    ids = torch.tensor([[1, 2], [8, 1]])
    compare(site, adapter, table[ids], ids)


def compare(site: object, adapter: nn.Module, expected: Tensor, x: Tensor) -> None:
    assert gap(site(x), expected) < EXACT  # type: ignore[operator]
    assert gap(merged(site, adapter, x), expected) < EXACT
    leaves = [*adapter.parameters(), *([x] if x.is_floating_point() else [])]
    weights = torch.randn(expected.shape, dtype=torch.float64)
    found = torch.autograd.grad((site(x) * weights).sum(), leaves)  # type: ignore[operator]
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert gap(mine, theirs) < EXACT


def test_dropout_leaves_the_base_whole() -> None:
    """Section 4.3: y = W x + b + (g - 1) W x̃ + g s B A x̃, with x̃ the dropped-out input."""
    torch.manual_seed(0)
    site, adapter = site_with(nn.Linear(6, 4).double(), use_dora=True, lora_dropout=0.5)
    x = torch.randn(5, 6, dtype=torch.float64)
    adapter.train()
    torch.manual_seed(1)
    found = site(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5, True)
    weight, bias = site.base_layer.weight, site.base_layer.bias
    delta = S * adapter.lora.lora_B @ adapter.lora.lora_A
    gain = adapter.lora_magnitude_vector / (weight + delta).norm(dim=1)
    expected = x @ weight.t() + bias + (gain - 1) * (dropped @ weight.t()) + gain * (dropped @ delta.t())
    assert gap(found, expected) < EXACT
    adapter.eval()
    assert gap(site(x), merged(site, adapter, x)) < EXACT


@pytest.mark.parametrize("init", [True, False])
def test_magnitudes_start_as_the_norms(init: bool) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=init)
    )
    site = model[0]
    (adapter,) = site.of("default").values()
    norms = (site.base_layer.weight + adapter.lora.weight_delta()).norm(dim=1)
    torch.testing.assert_close(adapter.lora_magnitude_vector, norms, rtol=1e-6, atol=0)  # float32


def test_two_of_them_add_their_changes() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double()
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], use_dora=True), "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"], use_dora=True))
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        before = model[0].base_layer(x)
        outputs = {}
        for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
            model.set_adapter(names)
            outputs["".join(names)] = model(x)
        together = outputs["a"] + outputs["b"] - before
        assert gap(outputs["ab"], together) < EXACT
        assert gap(outputs["ba"], together) < EXACT
        model.merge_adapter(["a", "b"])
        model.set_adapter(["a", "b"]) if not model._peft.routing.merged else None
        assert gap(model[0].base_layer(x), together) < EXACT


def test_the_norms_are_not_carried_over_to_a_copy() -> None:
    site, _ = site_with(nn.Linear(6, 5), use_dora=True)
    x = torch.randn(2, 6)
    site(x)
    for other in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        with torch.no_grad():
            other.base_layer.weight.mul_(3)
        (adapter,) = other.of("a").values()
        assert gap(other(x), merged(other, adapter, x)) < 1e-5  # float32


def test_refusals() -> None:
    with pytest.raises(TargetError, match="groups"):
        site_with(nn.Conv2d(4, 8, 3, groups=2), use_dora=True)
    with pytest.raises(TargetError, match="use_dora"):
        site_with(nn.MultiheadAttention(8, 2), use_dora=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        LoraConfig(use_dora=True, lora_bias=True)


def test_rows_of_zeros_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[2] = 0
    x = torch.randn(3, 5)
    before = model(x)
    model = get_peft_model(model, LoraConfig(target_modules=["0"], use_dora=True, r=2))
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.merge_and_unload()(x), before)

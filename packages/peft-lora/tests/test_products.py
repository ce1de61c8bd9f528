"""LoHa and LoKr: the papers' formulas written out, their dropouts, precision, and what backward keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import kept_for_backward
from peft_core import PeftModel, get_peft_model
from peft_core.errors import ConfigError, TargetError
from peft_lora import LoHaConfig, LoKrConfig
from peft_lora.lokr import factors_of

Config = type[LoHaConfig] | type[LoKrConfig]
both = pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])


def adapted(kind: Config, layer: nn.Module, **options: Any) -> Any:
    """A model of this one layer, with random factors."""
    model = get_peft_model(nn.Sequential(layer), kind(target_modules=["0"], **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.get_adapter_state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.5)
    return model


def factors(model: Any) -> dict[str, Tensor]:
    return {key.rpartition(".")[2]: tensor.detach() for key, tensor in model.get_adapter_state_dict().items()}


def layer(i: int = 12, o: int = 20, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(i, o).to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


# -- formulas


@pytest.mark.parametrize("r", [2, 5])  # as two products of rank r², and as ΔW
def test_loha_is_the_product_of_two_products(r: int) -> None:
    """2108.06098, proposition 1: (X₁ Y₁ᵀ) ∘ (X₂ Y₂ᵀ)."""
    model, x = adapted(LoHaConfig, layer(), r=r, alpha=3), inputs(7, 12)
    f = factors(model)
    expected = layer()(x).detach()
    for o in range(20):
        for i in range(12):
            w1, w2 = f["hada_w1_a"][o] @ f["hada_w1_b"][:, i], f["hada_w2_a"][o] @ f["hada_w2_b"][:, i]
            expected[:, o] += 3 / r * w1 * w2 * x[:, i]
    assert model[0].adapters.default.factored is (r == 2)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)


def test_lohas_tucker_form() -> None:
    """Proposition 3: each kernel is T ×₁ X ×₂ Y."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).double()
    model = adapted(LoHaConfig, copy.deepcopy(conv), r=2, alpha=5, use_effective_conv2d=True)
    f, x = factors(model), inputs(2, 4, 7, 7)
    kernels = []
    for number in (1, 2):
        t, a, b = f[f"hada_t{number}"], f[f"hada_w{number}_a"], f[f"hada_w{number}_b"]
        kernel = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
        for p in range(2):
            for q in range(2):
                kernel += a[p][:, None, None, None] * b[q][None, :, None, None] * t[p, q]
        kernels.append(kernel)
    weight = conv.weight + 5 / 2 * kernels[0] * kernels[1]
    expected = nn.functional.conv2d(x, weight, conv.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"r": 1}, {"r": 9}, {"r": 1, "decompose_both": True}, {"r": 1, "decompose_factor": 2}]
)
def test_lokr_is_a_kronecker_product(options: dict[str, Any]) -> None:
    """2212.10650, equation 5, ΔW = A ⊗ B, the second factor of low rank in 2309.14859."""
    model, x = adapted(LoKrConfig, layer(), alpha=3, **options), inputs(7, 12)
    f = factors(model)
    c = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    d = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
    u, v = (4, 3) if "decompose_factor" not in options else (2, 2)
    assert c.shape == (u, v) and d.shape == (20 // u, 12 // v)
    assert ("lokr_w2" in f) is (options["r"] == 9) and ("lokr_w1" in f) is ("decompose_both" not in options)
    weight = torch.cat([torch.cat([c[i, j] * d for j in range(v)], 1) for i in range(u)])
    expected = layer()(x) + 3 / options["r"] * x @ weight.t()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_lokr_on_a_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
    model = adapted(LoKrConfig, copy.deepcopy(conv), r=9, alpha=3)
    f, x = factors(model), inputs(2, 4, 7, 7)
    kernel = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    u, v = f["lokr_w1"].shape
    k, n = f["lokr_w2"].shape[:2]
    for o in range(6):
        for i in range(4):
            kernel[o, i] = f["lokr_w1"][o // k, i // n] * f["lokr_w2"][o % k, i % n]
    assert (u * k, v * n) == (6, 4)
    expected = nn.functional.conv2d(x, conv.weight + 3 / 9 * kernel, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        (512, -1, (16, 32)),
        (1376, -1, (32, 43)),
        (7, -1, (1, 7)),
        (1, -1, (1, 1)),
        (24, 4, (4, 6)),
        (24, 8, (8, 3)),  # it divides: taken as it is, though the greater comes first
        (24, 5, (4, 6)),
        (25, 4, (1, 25)),
    ],
)
def test_sizes_are_split_near_to_square(size: int, limit: int, expected: tuple[int, int]) -> None:
    assert factors_of(size, limit) == expected


# -- dropouts


def deltas(model: Any, x: Tensor, calls: int) -> Tensor:
    """What the adapter added in several calls, (calls, out), for one row of input."""
    torch.manual_seed(2)
    base = model[0].base_layer(x)
    return torch.stack([(model(x) - base)[0] for _ in range(calls)]).detach()


@both
def test_rank_dropout_leaves_out_features(kind: Config) -> None:
    scaled = {"rank_dropout_scale": True} if kind is LoKrConfig else {}
    model, x = adapted(kind, layer(), r=2, rank_dropout=0.3, **scaled), inputs(1, 12)
    whole = (model.eval()(x) - model[0].base_layer(x))[0].detach()
    found = deltas(model.train(), x, 400) / whole
    kept = found.abs() > 1e-9
    # 8000 draws of probability 0.7: five deviations are 0.026.
    assert abs(float(kept.double().mean()) - 0.7) < 0.026
    for row, features in zip(found, kept, strict=True):  # what is left makes up for what is not
        expected = 20 / features.sum().double()
        torch.testing.assert_close(row[features], expected.expand(int(features.sum())), rtol=1e-9, atol=0)
    assert torch.equal(model.eval()(x), model(x))


def test_lokr_does_not_scale_unless_asked_to() -> None:
    model, x = adapted(LoKrConfig, layer(), r=2, rank_dropout=0.3), inputs(1, 12)
    whole = (model.eval()(x) - model[0].base_layer(x))[0].detach()
    found = deltas(model.train(), x, 50) / whole
    kept = found.abs() > 1e-9
    torch.testing.assert_close(found[kept], torch.ones(int(kept.sum()), dtype=torch.float64), rtol=1e-9, atol=0)


@both
@pytest.mark.parametrize("conv", [False, True])
def test_module_dropout_leaves_out_the_layer(kind: Config, conv: bool) -> None:
    torch.manual_seed(0)
    one = nn.Conv2d(4, 6, 3).double() if conv else layer()
    x = inputs(1, 4, 3, 3) if conv else inputs(1, 12)
    model = adapted(kind, one, r=2, module_dropout=0.4)
    whole = (model.eval()(x) - model[0].base_layer(x))[0].detach()
    found = (deltas(model.train(), x, 400) / whole).flatten(1)
    out = found.abs().amax(1) < 1e-9
    # 400 draws of probability 0.4: five deviations are 0.12.
    assert abs(float(out.double().mean()) - 0.4) < 0.12
    torch.testing.assert_close(found[~out], torch.ones_like(found[~out]), rtol=1e-9, atol=0)


@both
def test_dropouts_train_in_one_graph_and_do_not_touch_a_merge(kind: Config) -> None:
    model, x = adapted(kind, layer(), r=2, rank_dropout=0.5, module_dropout=0.5).train(), inputs(3, 12)
    torch.compile(model, fullgraph=True, backend="eager")(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model.eval()(x)
    model.train().merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


# -- precision and memory


@both
@pytest.mark.parametrize("options", [{"r": 2}, {"r": 8}])
def test_gradients_are_those_of_the_formed_weight(kind: Config, options: dict[str, Any]) -> None:
    """The rules written by hand, against autograd through ΔW."""
    model, x = adapted(kind, layer(16, 24), **options), inputs(5, 16).requires_grad_(True)
    adapter = model[0].adapters.default
    weights = torch.linspace(-1, 1, 5 * 24, dtype=torch.float64).view(5, 24)
    parameters = [x, *adapter.parameters()]
    found = torch.autograd.grad((model(x) * weights).sum(), parameters)
    plain = model[0].base_layer(x) + x @ adapter.weight_delta().t()
    expected = torch.autograd.grad((plain * weights).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@both
def test_second_derivatives_are_refused(kind: Config) -> None:
    model, x = adapted(kind, layer(16, 24), r=2), inputs(5, 16).requires_grad_(True)
    (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_float32_parameters(kind: Config, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = adapted(kind, layer(32, 32, dtype), r=4)
    exact = adapted(kind, layer(32, 32, dtype).double(), r=4)
    x = inputs(9, 32, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    exact(x.double()).sum().backward()
    for mine, other in zip(model.parameters(), exact.parameters(), strict=True):
        if mine.requires_grad:
            assert mine.dtype is torch.float32 and mine.grad is not None and other.grad is not None
            # bfloat16 has 8 bits: 1/256 for each of a handful of roundings.
            assert float((mine.grad - other.grad).abs().max() / other.grad.abs().max()) < 0.03


@both
def test_backward_keeps_the_input_and_no_weight(kind: Config) -> None:
    """Bytes beyond what the frozen layer keeps (nothing): x, and what is between the factors.

    That is (rows, r²) in LoHa, (rows, r) at each of the 8 parts of x in LoKr.
    """
    i, o, rows, r = 64, 96, 40, 3
    model = adapted(kind, layer(i, o, torch.float32), r=r)
    x = inputs(rows, i, dtype=torch.float32).mul(1)  # no leaf: it counts
    kept = kept_for_backward(lambda: model(x.requires_grad_(True) * 1), model)
    between = 4 * rows * r * (r if kind is LoHaConfig else 8)
    assert kept == 4 * rows * i + between


@pytest.mark.parametrize("options", [{"r": 12}, {"r": 3, "use_effective_conv2d": True}])
def test_a_formed_weight_is_not_kept(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = adapted(LoHaConfig, nn.Conv2d(8, 16, 3), **options)
    assert not model[0].adapters.default.factored
    x = inputs(2, 8, 9, 9, dtype=torch.float32)
    assert kept_for_backward(lambda: model(x.requires_grad_(True) * 1), model) == x.numel() * 4


# -- refusals


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "positive integer"),
        ({"alpha": 0}, "alpha=0"),
        ({"rank_dropout": 1.0}, "probability"),
        ({"module_dropout": -0.1}, "probability"),
        ({"rank_pattern": {"q": 0}}, "'q'"),
        ({"alpha_pattern": {"q": 0}}, "'q'"),
        ({"init_weights": "gaussian"}, "init_weights"),
        ({"lora_alpha": 3}, "alpha"),
    ],
)
def test_what_cannot_work_is_refused(kind: Config, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_what_cannot_work_in_lokr_is_refused() -> None:
    with pytest.raises(ConfigError, match="decompose_factor"):
        LoKrConfig(decompose_factor=0)
    with pytest.raises(ConfigError, match="rank_dropout is 0"):
        LoKrConfig(rank_dropout_scale=True)


@both
def test_patterns_and_layers_are_checked(kind: Config) -> None:
    with pytest.raises(TargetError, match="rank_pattern: 'nowhere'"):
        get_peft_model(nn.Sequential(layer()), kind(target_modules=["0"], rank_pattern={"nowhere": 2}))
    with pytest.raises(TargetError, match="adapts linear layers and convolutions"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), kind(target_modules=["0"]))


def test_files_may_split_factors_otherwise(tmp_path: Path) -> None:
    """Which factors are whole is read off the keys, as other writers have other thresholds."""
    model = adapted(LoKrConfig, layer(16, 16), r=1, alpha=2).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        nn.Sequential(layer(16, 16)), tmp_path, config=model.peft_config["default"].resolve(decompose_both=True)
    )
    assert "lokr_w1" in factors(again)
    assert torch.equal(again(inputs(2, 16)), model(inputs(2, 16)))

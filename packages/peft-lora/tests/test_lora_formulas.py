"""The formulas of LoRA on each kind of layer, written out naively, over the layers' hyper-parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_by_hand import gap, merged, site_with
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_core.errors import MergeError, TargetError

# In float64 two ways to sum a few dozen terms differ by some units of 1e-16.
EXACT = 1e-13
S = 6 / 4

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
for dims, cls, size in ((1, nn.Conv1d, (13,)), (2, nn.Conv2d, (11, 9)), (3, nn.Conv3d, (7, 6, 8))):
    for label, options in {
        "plain": {},
        "no-bias": {"bias": False},
        "stride": {"stride": 2},
        "padding": {"padding": 2},
        "dilation": {"dilation": 2, "padding": 1},
        "same": {"padding": "same", "dilation": 2},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "circular": {"padding": 2, "padding_mode": "circular"},
        "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
        "groups": {"groups": 2, "padding": 1},
        "groups-dilation": {"groups": 4, "dilation": 2},
    }.items():
        torch.manual_seed(0)
        CONVOLUTIONS[f"conv{dims}d-{label}"] = (cls(4, 8, 3, **options).double(), (2, 4, *size))  # type: ignore[arg-type]


def check_gradients(site: Any, adapter: Any, reference: Tensor, *args: Tensor) -> None:
    """Every tensor of the adapter, and the input, has the reference's gradient."""
    leaves = [p for p in adapter.parameters() if p.requires_grad]
    leaves += [a for a in args if a.is_floating_point()]
    weights = torch.randn(reference.shape, generator=torch.Generator().manual_seed(9), dtype=reference.dtype)
    expected = torch.autograd.grad((reference * weights).sum(), leaves)
    found = torch.autograd.grad((site(*args) * weights).sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        assert gap(mine, theirs) < EXACT


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("kind", ["linear", "no-bias", "conv1d"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5), (0, 5)], ids=str)
def test_linear(kind: str, shape: tuple[int, ...], lora_bias: bool) -> None:
    torch.manual_seed(0)
    module = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind == "linear")
    module.double()
    site, adapter = site_with(module, lora_bias=lora_bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = module.weight.t() if kind == "conv1d" else module.weight
    extra = x @ adapter.lora_A.t() @ adapter.lora_B.t()
    if lora_bias:
        extra = extra + adapter.lora_bias
    expected = F.linear(x, weight, module.bias) + S * extra
    assert site(x).shape == expected.shape
    if 0 not in shape:
        assert gap(site(x), expected) < EXACT
        check_gradients(site, adapter, expected, x)
    if lora_bias and kind == "no-bias":
        with pytest.raises(MergeError, match="layer: the adapter has a bias"):
            merged(site, adapter, x)
    elif 0 not in shape:
        assert gap(merged(site, adapter, x), expected) < EXACT


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, lora_bias: bool) -> None:
    """y = W * x + s B * (A * x), with the layer's stride, padding, padding mode and dilation in A."""
    module, shape = CONVOLUTIONS[name]
    if lora_bias and module.bias is None:
        return
    site, adapter = site_with(module, lora_bias=lora_bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    a, b, groups = adapter.lora_A, adapter.lora_B, module.groups
    # B's groups written out: output group g reads the g-th slice of the ranks.
    full = torch.zeros(8, 4, dtype=torch.float64)
    for g in range(groups):
        rows, ranks = slice(g * 8 // groups, (g + 1) * 8 // groups), slice(g * 4 // groups, (g + 1) * 4 // groups)
        full[rows, ranks] = 1
    b_full = torch.cat([b.flatten(1)] * groups, 1) * full
    delta = S * torch.einsum("or,ri...->oi...", b_full, a)
    bare = type(module)(4, 8, 3, **_options(module)).double()
    expected = module(x) + _with(bare, delta)(x)
    if lora_bias:
        expected = expected + S * adapter.lora_bias.view(-1, *(1,) * (a.dim() - 2))
    assert gap(site(x), expected) < EXACT
    check_gradients(site, adapter, expected, x)
    if groups > 1:
        with pytest.raises(MergeError, match="groups"):
            merged(site, adapter, x)
    else:
        assert gap(merged(site, adapter, x), expected) < EXACT


def _options(module: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "padding_mode")
    return {**{name: getattr(module, name) for name in names}, "bias": False}


def _with(module: Any, weight: Tensor) -> Any:
    return lambda x: torch.func.functional_call(module, {"weight": weight}, (x,))


def test_convolution_refuses_ranks_that_the_groups_do_not_divide() -> None:
    with pytest.raises(TargetError, match="groups"):
        site_with(nn.Conv2d(4, 8, 3, groups=4), r=6)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_embedding(padding: int | None, scale: float | None) -> None:
    """Row v is W[v] + s (B A)ᵀ[v], times `embed_scale`; the padding row has no gradient."""

    class Scaled(nn.Embedding):
        embed_scale = scale

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (scale or 1.0)

    torch.manual_seed(0)
    module = Scaled(11, 6, padding_idx=padding).double()
    site, adapter = site_with(module)
    ids = torch.tensor([[3, 1, 10], [0, 3, 3]])
    a, b = adapter.lora_embedding_A, adapter.lora_embedding_B
    expected = (scale or 1.0) * (module.weight + S * (b @ a).t())[ids]
    assert gap(site(ids), expected) < EXACT
    assert gap(merged(site, adapter, ids), expected) < EXACT
    weights = torch.randn_like(expected)
    grad_a, grad_b = torch.autograd.grad((site(ids) * weights).sum(), [a, b])
    want_a, want_b = torch.autograd.grad((expected * weights).sum(), [a, b])
    if padding is not None:
        assert not grad_a[:, padding].any()
        want_a = want_a.index_fill(1, torch.tensor([padding]), 0.0)
    assert gap(grad_a, want_a) < EXACT
    assert gap(grad_b, want_b) < EXACT


def test_embedding_with_max_norm_is_refused() -> None:
    with pytest.raises(TargetError, match="max_norm"):
        site_with(nn.Embedding(5, 4, max_norm=1.0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
def test_attention(batch_first: bool, bias: bool, grad: bool) -> None:
    """Both projections get W + s B A, each once."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias).double().eval()
    site, adapter = site_with(module)
    q, k, v = (torch.randn(3, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = adapter.out_proj
    weights = {
        "in_proj_weight": module.in_proj_weight + S * adapter.lora_B @ adapter.lora_A,
        "out_proj.weight": module.out_proj.weight + S * out.lora_B @ out.lora_A,
    }
    bare = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias).double()
    bare.load_state_dict(module.state_dict())
    expected = torch.func.functional_call(bare, weights, (q, k, v))[0]
    with torch.set_grad_enabled(grad):
        assert gap(site(q, k, v)[0], expected) < EXACT
        # Self-attention without weights takes another kernel in inference.
        same = torch.func.functional_call(bare, weights, (q, q, q), {"need_weights": False})[0]
        assert gap(site(q, q, q, need_weights=False)[0], same) < EXACT
    if grad:
        leaves = [*adapter.parameters(), q, k, v]
        found = torch.autograd.grad(site(q, k, v)[0].square().sum(), leaves)
        for mine, theirs in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            assert gap(mine, theirs) < 1e-12  # a longer chain of sums


def test_attention_of_different_widths_is_refused() -> None:
    with pytest.raises(TargetError, match="different widths"):
        site_with(nn.MultiheadAttention(8, 2, kdim=6, vdim=6))


def test_attention_refuses_dropout_that_it_could_not_apply() -> None:
    with pytest.raises(TargetError, match="lora_dropout"):
        site_with(nn.MultiheadAttention(8, 2), lora_dropout=0.1)


def test_dropout_acts_on_what_a_reads_and_only_in_training() -> None:
    torch.manual_seed(0)
    site, adapter = site_with(nn.Linear(6, 4), lora_dropout=0.5)
    x = torch.randn(3, 6)
    adapter.train()
    torch.manual_seed(1)
    found = site(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5, True)
    expected = site.base_layer(x) + S * dropped @ adapter.lora_A.t() @ adapter.lora_B.t()
    assert gap(found, expected) < 1e-6  # float32
    adapter.eval()
    assert torch.equal(site(x), site(x))


@pytest.mark.parametrize(
    "module",
    [nn.Linear(16, 24), nn.Conv2d(16, 8, 3), nn.Embedding(9, 16), nn.MultiheadAttention(16, 2)],
    ids=lambda m: type(m).__name__,
)
def test_float32_and_bfloat16(module: nn.Module) -> None:
    """Forward equals merge to 1e-5 in float32. In bfloat16 both stay within some roundings of float32."""
    site, adapter = site_with(module)
    shape = (2, 16, 5, 5) if isinstance(module, nn.Conv2d) else (4, 3, 16)
    x: Any = torch.randint(0, 9, (4, 3)) if isinstance(module, nn.Embedding) else torch.randn(shape)
    args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)

    def run(*args: Any) -> Tensor:
        out = site(*args)
        return out[0] if isinstance(out, tuple) else out

    # 24 additions of float32 rounding, 6e-8 each, at the worst 1.4e-6; sums of two ways.
    exact = run(*args)
    whole = merged(site, adapter, *args)
    assert gap(exact, whole[0] if isinstance(whole, tuple) else whole) < 1e-5
    module.to(torch.bfloat16)
    half = run(*(a.to(torch.bfloat16) if a.is_floating_point() else a for a in args))
    assert half.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    # One rounding is 2⁻⁹; weights, input, products and sums are rounded, and partly cancel.
    assert gap(half, exact) < 12 * 2**-9


@pytest.mark.parametrize("dora", [False, True])
def test_autocast(dora: bool) -> None:
    site, adapter = site_with(nn.Linear(16, 24), use_dora=dora)
    x = torch.randn(4, 3, 16, requires_grad=True)
    exact = site(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = site(x)
        half.float().square().sum().backward()
    assert half.dtype == torch.bfloat16
    assert gap(half, exact) < 12 * 2**-9
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora: bool) -> None:
    _, adapter = site_with(nn.Linear(4, 4), r=4, lora_alpha=6, use_rslora=rslora)
    assert adapter.scaling == (3.0 if rslora else 1.5)


def test_starts() -> None:
    """The published starting values: their distribution, and what they make of the layer."""
    from peft_core.layers import SiteRequest, layer_of
    from peft_lora.linear import LoraLinear
    from peft_lora.settings import Settings

    torch.manual_seed(0)
    layer = layer_of(nn.Linear(400, 300), SiteRequest("layer"))

    def started(init: Any) -> LoraLinear:
        adapter = LoraLinear(layer, Settings(r=20, scaling=1.0, init=init))
        with torch.no_grad():
            adapter.reset_parameters()
        return adapter

    uniform = 1 / 400**0.5
    for init in (True, False):
        adapter = started(init)
        assert 0.99 * uniform < adapter.lora_A.abs().max() <= uniform
        assert bool(adapter.lora_B.any()) is (init is False)
    assert started(False).lora_B.abs().max() <= 1 / 20**0.5
    # 8,000 values: the deviation is known to about one part in a hundred.
    assert started("gaussian").lora_A.std().item() == pytest.approx(1 / 20, rel=0.05)
    orthogonal = started("orthogonal")
    assert orthogonal.lora_A.abs().max() > 0.05
    assert orthogonal.lora_B.abs().max() > 0.05
    # Sums of 20 products in float32.
    assert orthogonal.weight_delta().abs().max() < 1e-7

"""IA3's maths on single layers: the formula, merging, gradients, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from peft_core.errors import ConfigError, TargetError
from peft_core.layers import SiteRequest, layer_of
from peft_core.routing import Request, Routing
from peft_core.site import Site
from peft_ia3 import IA3Adapter, IA3Config

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv1d-reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "conv1d-unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 8, 7)),
    "conv2d-no-bias": (lambda: nn.Conv2d(4, 6, (1, 3), bias=False), (2, 4, 8, 7)),
    "conv2d-stride-padding": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2)), (2, 4, 8, 7)),
    "conv2d-same-dilated": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 7)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 8, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8, 7)),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 5, 3)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 6, 2, groups=2), (2, 4, 4, 5, 3)),
}
LINEARS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (2, 3, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 6, bias=False), (2, 4)),
    "linear-one-row": (lambda: nn.Linear(4, 6), (4,)),
    "transformers-conv1d": (lambda: Conv1D(6, 4), (2, 3, 4)),
}
LAYERS = LINEARS | CONVOLUTIONS


def attach(module: nn.Module, feedforward: bool, seed: int = 1) -> tuple[Site, IA3Adapter]:
    layer = layer_of(module, SiteRequest("layer"))
    site, adapter = Site(layer, Routing()), IA3Adapter(layer, feedforward)
    adapter.reset_parameters()
    with torch.no_grad():
        adapter.ia3_l.copy_(torch.randn(adapter.ia3_l.shape, generator=torch.Generator().manual_seed(seed)))
    site.attach("a", "", adapter)
    site._routing.default = Request(("a",))
    return site, adapter


def channels(module: nn.Module, l_vector: Tensor, x: Tensor) -> Tensor:
    """l_vector along the feature axis of x: the last for linear layers, the channels for convolutions."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return l_vector.reshape(-1, *(1,) * len(module.kernel_size)) if convolution else l_vector.flatten()


@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_the_formula(kind: str, feedforward: bool) -> None:
    make, shape = LAYERS[kind]
    module, x = make(), torch.randn(shape)
    site, adapter = attach(module, feedforward)
    factor = channels(module, adapter.ia3_l, x)
    expected = module(x * factor) if feedforward else module(x) * factor
    # The same operations in the same order: no rounding in between.
    assert torch.equal(site(x), expected)


@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weights_compute_the_same(kind: str, feedforward: bool) -> None:
    make, shape = LAYERS[kind]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    site, adapter = attach(module, feedforward)
    params = site._layer.params()
    before = {name: value.clone() for name, value in params.items()}
    merged = adapter.merge(params)
    # float64: what remains is the order of some tens of additions, far below 1e-12.
    torch.testing.assert_close(site._layer.call(merged, x), site(x), rtol=0, atol=1e-12)
    for name, value in params.items():
        assert torch.equal(value, before[name]), f"merge wrote into {name}"
    assert ("bias" in merged) == ("bias" in params)
    if feedforward and "bias" in params:
        assert merged["bias"] is params["bias"], "the bias is added after the input is rescaled"


@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_formula(kind: str, feedforward: bool) -> None:
    make, shape = LAYERS[kind]
    module, x = (
        make().double().requires_grad_(False),
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
    )
    site, adapter = attach(module, feedforward)
    weights = torch.randn_like(site(x))

    (site(x) * weights).sum().backward()
    assert x.grad is not None
    assert adapter.ia3_l.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())

    l_free, x_free = adapter.ia3_l.detach().requires_grad_(), x.detach().requires_grad_()
    factor = channels(module, l_free, x_free)
    expected = module(x_free * factor) if feedforward else module(x_free) * factor
    by_l, by_x = torch.autograd.grad((expected * weights).sum(), (l_free, x_free))
    torch.testing.assert_close(adapter.ia3_l.grad, by_l, rtol=0, atol=1e-12)  # float64, as above
    torch.testing.assert_close(x.grad, by_x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize(
    ("module", "out_shape", "in_shape"),
    [
        (nn.Linear(4, 6), (6, 1), (1, 4)),
        (Conv1D(6, 4), (6, 1), (1, 4)),
        (nn.Conv1d(4, 6, 3), (1, 6, 1), (1, 4, 1)),
        (nn.Conv2d(4, 6, 3), (1, 6, 1, 1), (1, 4, 1, 1)),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 6, 1, 1), (1, 4, 1, 1)),
        (nn.Conv3d(4, 6, 3), (1, 6, 1, 1, 1), (1, 4, 1, 1, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_saved_shapes(
    module: nn.Module, out_shape: tuple[int, ...], in_shape: tuple[int, ...], feedforward: bool
) -> None:
    _, adapter = attach(module, feedforward)
    assert {slot: tuple(t.shape) for slot, t in adapter.state().items()} == {
        "ia3_l": in_shape if feedforward else out_shape
    }


def test_start_is_the_base_bit_for_bit() -> None:
    module, x = nn.Linear(4, 6), torch.randn(3, 4)
    for feedforward in (False, True):
        site, adapter = attach(module, feedforward)
        adapter.reset_parameters()
        assert torch.equal(site(x), module(x))


def test_start_from_noise() -> None:
    torch.manual_seed(0)
    adapter = IA3Adapter(layer_of(nn.Linear(2, 4096), SiteRequest("layer")), feedforward=False, ones=False)
    adapter.reset_parameters()
    # 4096 draws of N(0, 1): the mean is within 5 standard errors (5/64), the deviation within 5
    # (5/sqrt(8192)).
    assert abs(adapter.ia3_l.mean().item()) < 0.08
    assert abs(adapter.ia3_l.std().item() - 1) < 0.06


def test_adapters_multiply() -> None:
    """Stacking follows the order of merging: a vector on the output scales what adapters further in gave."""
    module, x = nn.Linear(4, 6).double(), torch.randn(2, 4, dtype=torch.float64)
    site, first = attach(module, feedforward=False)
    _, second = attach(module, feedforward=True, seed=2)
    site.attach("b", "", second)
    site._routing.default = Request(("a", "b"))
    factor = first.ia3_l.flatten()
    torch.testing.assert_close(site(x), module(x * second.ia3_l) * factor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
def test_half_precision_base_is_not_cast_up(dtype: torch.dtype, feedforward: bool) -> None:
    module, x = nn.Linear(4, 6, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    site, adapter = attach(module, feedforward)
    adapter.float()
    factor = adapter.ia3_l.flatten().to(dtype)
    expected = module(x * factor) if feedforward else module(x) * factor
    assert site(x).dtype is dtype
    assert torch.equal(site(x), expected)
    site(x).sum().backward()
    assert adapter.ia3_l.grad is not None
    assert adapter.ia3_l.grad.dtype is torch.float32


class CountOperations(TorchDispatchMode):
    """Counts what reaches the dispatcher, views apart from work."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "extra"), [(torch.float32, 2), (torch.bfloat16, 3)])
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
def test_operations_beyond_the_base(dtype: torch.dtype, extra: int, feedforward: bool) -> None:
    """A view of l, a cast of l where dtypes differ, a product: what handwritten code needs (HF PEFT: 4.1)."""
    module, x = nn.Linear(4, 6, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    site, adapter = attach(module, feedforward)
    adapter.float()
    counts = []
    for call in (module, site):
        with CountOperations() as counter:
            call(x)
        counts.append(len(counter.names))
    assert counts[1] - counts[0] == extra, counter.names


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(5, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Bilinear(2, 2, 2)],
    ids=lambda module: type(module).__name__,
)
def test_other_layers_are_refused(module: nn.Module) -> None:
    with pytest.raises(TargetError, match=rf"blocks\.0 \({type(module).__name__}\): IA3 rescales"):
        IA3Adapter(layer_of(module, SiteRequest("blocks.0")), feedforward=False)


class TestConfig:
    def test_fields_and_defaults_are_those_of_hf_peft(self) -> None:
        assert IA3Config().to_dict() == {
            "base_model_name_or_path": None,
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "feedforward_modules": None,
            "inference_mode": False,
            "init_ia3_weights": True,
            "modules_to_save": None,
            "peft_type": "IA3",
            "revision": None,
            "target_modules": None,
            "task_type": None,
        }

    def test_feedforward_outside_targets(self) -> None:
        with pytest.raises(ConfigError, match="'w9'"):
            IA3Config(target_modules=["k", "v"], feedforward_modules=["v", "w9"])

    @pytest.mark.parametrize("none", [[], ()])
    def test_no_feedforward_is_a_choice(self, none: object) -> None:
        assert IA3Config(target_modules=["k"], feedforward_modules=none).feedforward_modules == ()

    @pytest.mark.parametrize("wrong", [[""], "", [1], 3])
    def test_feedforward_of_another_type(self, wrong: object) -> None:
        with pytest.raises(ConfigError, match="feedforward_modules"):
            IA3Config(feedforward_modules=wrong)

    def test_round_trip(self) -> None:
        config = IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"], init_ia3_weights=False)
        assert IA3Config.from_dict(config.to_dict()) == config

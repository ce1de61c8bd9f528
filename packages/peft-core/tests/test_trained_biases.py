"""Biases of the base that an adapter has of its own: which ones, what they compute, where files have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from peft_core import (
    PeftModel,
    TargetedConfig,
    WeightAdapter,
    get_peft_model,
    hookimpl,
    register_method,
    unregister_method,
)
from peft_core.biases import bias_sites, is_bias, own_bias


class DoubleConfig(TargetedConfig):
    peft_type: ClassVar[str] = "DOUBLE"
    bias: Literal["none", "all", "double_only"] = "none"


class DoubleAdapter(WeightAdapter):
    """The weight times a learned number."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.by = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.by)

    def merge(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**params, "weight": params["weight"] * self.by.to(params["weight"].dtype)}


class Double:
    @hookimpl
    def peft_config(self) -> type[DoubleConfig]:
        return DoubleConfig

    @hookimpl
    def peft_sites(self, config: Any, model: nn.Module, matched: Any) -> Any:
        return bias_sites(config, model, matched)

    @hookimpl
    def peft_build(self, layer: Any) -> Any:
        return own_bias(layer) if is_bias(layer) else DoubleAdapter(layer)


class Net(nn.Module):
    """(batch, 4, 8) -> (batch, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.plain = nn.Linear(8, 8, bias=False)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        out: Tensor = self.head(self.inner(self.plain(self.conv(x))).mean(1))
        return out


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    method = register_method(Double(), replace=True)
    yield
    unregister_method(method.name)


def net() -> Any:
    torch.manual_seed(0)
    return Net().double().eval()


X = torch.linspace(-1, 1, 64, dtype=torch.float64).view(2, 4, 8).sin()
START = "base_model.model."


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, set()),
        ({"bias": "double_only"}, {"inner.base_layer.bias", "conv.base_layer.bias"}),
        (
            {"bias": "all"},
            {
                "inner.base_layer.bias", "conv.base_layer.bias", "head.bias", "norm.bias",
                "attention.in_proj_bias", "attention.out_proj.bias",
            },
        ),
        (
            {"bias": "all", "modules_to_save": ["head"]},
            {
                "inner.base_layer.bias", "conv.base_layer.bias", "norm.bias", "head.bias",
                "attention.in_proj_bias", "attention.out_proj.bias",
            },
        ),
    ],
    ids=["none", "only", "all", "all-and-a-copy"],
)  # fmt: skip
def test_which_biases(options: dict[str, Any], keys: set[str]) -> None:
    config = DoubleConfig(target_modules=["inner", "conv", "plain"], **options)
    state = get_peft_model(net(), config).get_adapter_state_dict()
    assert {key.removeprefix(START) for key in state if "bias" in key} == keys
    # A head that is trained in full has its bias once.
    assert sum("head.bias" in key for key in state) == ("head.bias" in keys)


@pytest.mark.parametrize("choice", ["all", "double_only"])
def test_the_adapters_biases_act_and_the_bases_stay(choice: str, tmp_path: Any) -> None:
    base = net()
    expected = base(X).detach()
    stored = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, DoubleConfig(target_modules=["inner", "conv"], bias=choice))
    # A frozen model may take other kernels.
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    plain = net()
    with torch.no_grad():
        for key, tensor in model.get_adapter_state_dict().items():
            if "bias" in key:
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
                place = key.removeprefix(START).replace("base_layer.", "")
                plain.get_parameter(place).copy_(tensor)
    wanted = plain(X).detach()
    assert float((wanted - expected).abs().max()) > 0.1
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-12)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(again(X), wanted, rtol=0, atol=1e-12)
    again.merge_adapter()
    torch.testing.assert_close(again(X), wanted, rtol=0, atol=1e-12)
    model.unload()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in base.state_dict().items())

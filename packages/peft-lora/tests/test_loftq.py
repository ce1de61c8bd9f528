"""LoftQ on a base that is quantised: A and B make up for what was lost, and the base is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from starts_by_hand import IDS, lora, net
from torch import Tensor, nn

from peft_core import get_peft_model, hookimpl
from peft_core.errors import ConfigError, MergeError, PeftError, TargetError
from peft_core.extensions import register_extension, unregister_extension
from peft_core.layers import BaseLayer, SiteRequest
from peft_lora import LoraConfig, replace_lora_weights_loftq

TARGETS = ["block.q", "block.up"]


class Coarse(nn.Module):
    """A linear layer whose weight is kept as multiples of a quarter, in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", (linear.weight.detach() * 4).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes / 4.0, self.bias)  # type: ignore[operator]


class CoarseLayer(BaseLayer):
    kind = "linear"
    names = ("weight", "bias")
    dtype = torch.float32  # type: ignore[assignment]

    @property
    def in_features(self) -> int:
        return int(self.module.codes.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.module.codes.shape[0])

    @property
    def device(self) -> torch.device:
        return self.build_device or self.module.codes.device

    def params(self) -> dict[str, Tensor]:
        return {"weight": self.module.codes / 4.0, "bias": self.module.bias}

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return F.linear(args[0], params["weight"], params["bias"])


class Storage:
    @hookimpl
    def peft_layer(self, path: str, module: nn.Module) -> BaseLayer | None:
        return CoarseLayer(module, path, SiteRequest(path)) if isinstance(module, Coarse) else None


@pytest.fixture(autouse=True)
def _storage() -> Iterator[None]:
    register_extension(Storage(), "coarse")
    yield
    unregister_extension("coarse")


def coarse(**fields: Any) -> Any:
    """The model with two layers quantised, and a LoRA on them."""
    model = net()
    for path in TARGETS:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, Coarse(model.get_submodule(path)))
    config = LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": TARGETS, **fields})
    return get_peft_model(model, config).eval()


def lost(model: Any, path: str) -> Tensor:
    """W - Q."""
    layer: Tensor = net().get_submodule(path).weight.detach() - model.get_submodule(path).base_layer.codes / 4.0
    return layer


@pytest.mark.parametrize("source", ["model", "mapping", "file", "shards", "suffix"])
def test_the_product_is_the_best_form_of_what_was_lost(source: str, tmp_path: Path) -> None:
    full: Any = net()
    if source != "model":
        full = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    if source == "file":
        save_file(full, tmp_path / "m.safetensors")
        full = tmp_path / "m.safetensors"
    elif source == "shards":
        for index, path in enumerate(TARGETS):
            save_file({f"{path}.weight": full[f"{path}.weight"]}, tmp_path / f"model-{index}.safetensors")
        full = str(tmp_path)
    elif source == "suffix":  # a file of the inner model alone
        full = {name.removeprefix("block."): tensor for name, tensor in full.items() if name.startswith("block.")}
    model = coarse(use_rslora=source == "shards")
    codes = {path: model.get_submodule(path).base_layer.codes.clone() for path in TARGETS}
    assert replace_lora_weights_loftq(model, full) == tuple(TARGETS)
    for path in TARGETS:
        u, s, vh = torch.linalg.svd(lost(model, path))
        one = lora(model, path)
        wanted = (u[:, :3] * s[:3]) @ vh[:3]
        torch.testing.assert_close(one.scaling * one.b @ one.a, wanted, rtol=2e-5, atol=2e-6)
        assert torch.equal(model.get_submodule(path).base_layer.codes, codes[path])


def test_it_brings_the_model_nearer_to_the_one_before() -> None:
    with torch.no_grad():
        wanted = net()(IDS)["logits"]
        errors = []
        for rank in (1, 4, 12):
            model = coarse(r=rank)
            before = (model(IDS)["logits"] - wanted).norm()
            replace_lora_weights_loftq(model, net())
            errors.append(float((model(IDS)["logits"] - wanted).norm() / before))
    # At full rank nothing is lost but rounding, in float32.
    assert errors[0] < 1 and errors == sorted(errors, reverse=True) and errors[2] < 1e-5


def test_a_change_can_be_taken_back() -> None:
    model = coarse()
    before = {path: (lora(model, path).a.clone(), lora(model, path).b.clone()) for path in TARGETS}
    asked: list[str] = []

    def only_the_last(changed: nn.Module, path: str) -> bool:
        assert changed is model and lora(model, path).b.any()
        asked.append(path)
        return path == TARGETS[1]

    assert replace_lora_weights_loftq(model, net(), callback=only_the_last) == (TARGETS[1],)
    assert asked == TARGETS
    assert torch.equal(lora(model, TARGETS[0]).a, before[TARGETS[0]][0]) and not lora(model, TARGETS[0]).b.any()
    assert lora(model, TARGETS[1]).b.any()


def test_what_cannot_be_done(tmp_path: Path) -> None:
    model = coarse()
    before = lora(model, TARGETS[0]).a.clone()
    with pytest.raises(ConfigError, match="give model_path"):
        replace_lora_weights_loftq(model)
    with pytest.raises(ConfigError, match=r"no weight 'block.up.weight'"):
        replace_lora_weights_loftq(model, {"block.q.weight": net().block.q.weight})
    wrong = {**net().state_dict(), "block.up.weight": torch.zeros(3, 3)}
    with pytest.raises(ConfigError, match=r"block.up: .* is \(3, 3\), and the base's \(16, 12\)"):
        replace_lora_weights_loftq(model, wrong)
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        replace_lora_weights_loftq(model, tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(ConfigError, match="cannot be read"):
        replace_lora_weights_loftq(model, tmp_path)
    assert torch.equal(lora(model, TARGETS[0]).a, before) and not lora(model, TARGETS[0]).b.any()
    with pytest.raises(ConfigError, match="is it quantised"):
        replace_lora_weights_loftq(get_peft_model(net(), LoraConfig(target_modules=TARGETS)), net())
    with pytest.raises(ConfigError, match="no plain LoRA"):
        replace_lora_weights_loftq(coarse(use_dora=True), net())
    with pytest.raises(ConfigError, match="no plain LoRA"):
        replace_lora_weights_loftq(coarse(init_lora_weights="pissa"), net())
    with pytest.raises(PeftError, match="no adapters"):
        replace_lora_weights_loftq(net(), net())
    merged = get_peft_model(net(), LoraConfig(target_modules=TARGETS))
    merged.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        replace_lora_weights_loftq(merged, net())


def test_lora_ga_says_that_such_a_weight_has_no_gradient() -> None:
    with pytest.raises(TargetError, match="block.q .*no gradient"):
        get_peft_model(
            coarse().unload(), LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=TARGETS), calibration=[IDS]
        )


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_starts_read_such_a_weight_through_its_view(start: str) -> None:
    base = coarse().unload()
    with torch.no_grad():
        expected = base(IDS)["logits"]
        model = get_peft_model(base, LoraConfig(r=3, init_lora_weights=start, target_modules=TARGETS)).eval()
        assert torch.equal(model(IDS)["logits"], expected)
        if start == "pissa":
            q = base.get_submodule("block.up").base_layer.codes / 4.0
            u, s, vh = torch.linalg.svd(q)
            one = lora(model, "block.up")
            torch.testing.assert_close(one.scaling * one.b @ one.a, (u[:, :3] * s[:3]) @ vh[:3], rtol=2e-5, atol=2e-6)

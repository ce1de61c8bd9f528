"""Extension points E6, calibration with data, and E7, base edits that leave the base alone.

Each is proved by toy methods that use the public API alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from peft_core import (
    AdapterState,
    ConfigError,
    DeltaAdapter,
    PeftModel,
    TargetedConfig,
    TargetError,
    get_peft_model,
)
from tests.toy_plugins import Net, net, plugin, randomise, registered

ALL = ["up", "down", "head"]
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
Y = torch.tensor([0, 1, 3])


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {"x": torch.randn(8, 6, generator=generator), "labels": torch.randint(4, (8,), generator=generator)}
        for _ in range(count)
    ]


def weights(model: nn.Module) -> dict[str, Tensor]:
    named = model.base_state_dict() if isinstance(model, PeftModel) else model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Pair(DeltaAdapter):
    """B A x, of a rank of its own; where the config says so, less what it was at the start."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        rank = config.rank_pattern.get(layer.path, config.r)
        self.a = layer.parameter(rank, layer.in_features)
        self.b = layer.parameter(layer.out_features, rank)
        self.start = config.start
        if self.start:
            self.a0 = layer.parameter(rank, layer.in_features).requires_grad_(False)
            self.b0 = layer.parameter(layer.out_features, rank).requires_grad_(False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.a)
        nn.init.zeros_(self.b)
        if self.start in ("svd", "qr"):
            weight = self.layer.weight
            if self.start == "svd":
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                b, a = u * s.sqrt(), s.sqrt()[:, None] * v
            else:
                b, a = torch.linalg.qr(weight)
            for tensor, value in ((self.a, a[: len(self.a)]), (self.b, b[:, : len(self.a)])):
                tensor.copy_(value)
        if self.start:
            self.a0.copy_(self.a)
            self.b0.copy_(self.b)

    def delta(self, x: Tensor) -> Tensor:
        out = x @ self.a.T @ self.b.T
        return out - x @ self.a0.T @ self.b0.T if self.start else out

    def weight_delta(self) -> Tensor:
        return self.b @ self.a - (self.b0 @ self.a0 if self.start else 0)


# -- E6: calibration ---------------------------------------------------------------------------------------------------


class E6Config(TargetedConfig):
    peft_type: ClassVar[str] = "TOYE6"
    r: int = 2
    budget: int = 6
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    start: str = ""
    way: str = "inputs"
    unused: str = ""


def by_inputs(config: E6Config, layers: Sequence[Any], batches: Any) -> AdapterState:
    """The directions of the inputs with the largest variance, over all sites; sites that get none are dropped."""
    sums: dict[str, Tensor] = {}
    for seen in batches.inputs(layers):
        for path, x in seen.items():
            sums[path] = sums.get(path, 0) + x.T @ x
    found = {path: torch.linalg.eigh(total) for path, total in sums.items()}
    ranked = sorted(
        ((float(v), path) for path, (values, _) in found.items() for v in values / values.sum()), reverse=True
    )
    ranks: dict[str, int] = {}
    for _, path in ranked[: config.budget]:
        ranks[path] = ranks.get(path, 0) + 1
    tensors = {path: {"a": found[path].eigenvectors[:, -rank:].T.flip(0)} for path, rank in ranks.items()}
    return AdapterState(config.resolve(target_modules=list(ranks), rank_pattern=ranks), tensors)


def by_gradients(config: E6Config, layers: Sequence[Any], batches: Any) -> AdapterState:
    """The largest singular vectors of the mean gradient; the start of B A is subtracted."""
    total: dict[str, Tensor] = {}
    count = 0
    for gradients in batches.gradients(layers):
        count += 1
        for path, gradient in gradients.items():
            total[path] = total.get(path, 0) + gradient
    tensors = {}
    for path, gradient in total.items():
        u, _, v = torch.linalg.svd(gradient / count, full_matrices=False)
        a, b = v[: config.r], u[:, : config.r]
        tensors[path] = {"a": a, "b": b, "a0": a, "b0": b}
    return AdapterState(config.resolve(start="data"), tensors)


def e6_calibrate(model: Any, config: E6Config, layers: Sequence[Any], batches: Any) -> AdapterState | None:
    if config.way == "nothing":
        return None
    if config.way == "rude":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.train()
        for batch in batches:
            batches.run(batch).loss.backward()
            raise ZeroDivisionError("half way")
    if config.way == "loud":
        OUTPUTS.append(batches.run(next(iter(batches))).logits)
        return None
    state = by_inputs(config, layers, batches) if config.way == "inputs" else by_gradients(config, layers, batches)
    if config.way == "gradients" and config.unused:
        return AdapterState(state.config, {**state.tensors, config.unused: {"a": X}})
    return state


OUTPUTS: list[Tensor] = []


@pytest.fixture
def e6() -> Iterator[None]:
    OUTPUTS.clear()
    with registered(plugin(E6Config, Pair, peft_calibrate=e6_calibrate)):
        yield


def pairs(model: Any, name: str = "default") -> dict[str, Any]:
    return {path: site.of(name)[""] for path, site in model._peft.sites.items() if name in site.names()}


def test_e6_forward_statistics_resize_and_drop_sites(e6: None, tmp_path: Path) -> None:
    config = E6Config(target_modules=ALL)
    model = get_peft_model(net(), config, calibration=batches())
    assert config.rank_pattern == {}  # the user's object is the user's
    resolved = model.peft_config["default"]
    found = pairs(model)
    assert (
        set(found) == set(resolved.target_modules) == set(resolved.rank_pattern) < {n for n, _ in net().named_modules()}
    )
    assert {path: len(one.a) for path, one in found.items()} == resolved.rank_pattern
    assert sum(resolved.rank_pattern.values()) == 6 and len(set(resolved.rank_pattern.values())) > 1
    # By hand, at the first layer: what it sees are the batches themselves.
    _, vectors = torch.linalg.eigh(sum(batch["x"].T @ batch["x"] for batch in batches()))
    first = found["blocks.0.up"].a
    assert torch.equal(first, vectors[:, -len(first) :].T.flip(0))
    assert torch.equal(model(X).logits, net()(X).logits)  # B is zero
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)  # without data
    assert again.peft_config["default"].rank_pattern == resolved.rank_pattern
    assert torch.equal(again(X).logits, model(X).logits)


def test_e6_gradients_of_the_base_weights(e6: None, tmp_path: Path) -> None:
    model = get_peft_model(net(), E6Config(target_modules=ALL, way="gradients"), calibration=batches())
    by_hand = net()
    for batch in batches():
        by_hand(**batch).loss.backward()  # sums
    u, _, v = torch.linalg.svd(by_hand.head.weight.grad / 3, full_matrices=False)
    # float32: the mean of sums, once by autograd's accumulation; vectors up to their sign.
    torch.testing.assert_close(pairs(model)["head"].a.abs(), v[:2].abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(pairs(model)["head"].b.abs(), u[:, :2].abs(), rtol=0, atol=1e-5)
    assert torch.equal(model(X).logits, net()(X).logits)  # what it starts with is subtracted
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X).logits, model(X).logits)


def traces(model: nn.Module) -> dict[str, Any]:
    return {
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()},
    }


def prepared() -> Net:
    """A model whose state says what was there before."""
    model = net()
    model(X, labels=Y).loss.backward()
    model.train()
    model.blocks[0].eval()
    model.head.bias.requires_grad_(False)
    return model


def test_e6_calibration_leaves_no_trace(e6: None) -> None:
    model = prepared()
    before, values = traces(model), weights(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rude = E6Config(target_modules=ALL, way="rude")
    with pytest.raises(ZeroDivisionError, match="half way") as caught:
        get_peft_model(model, rude, calibration=batches())
    assert any("peft_calibrate" in note for note in caught.value.__notes__)
    assert type(model) is Net and traces(model) == before and same(weights(model), values)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
    for way in ("inputs", "gradients", "nothing"):
        model = prepared()
        before, values = traces(model), weights(model)
        get_peft_model(model, E6Config(target_modules=ALL, way=way), calibration=batches())
        assert same(weights(model), values)
        model.unload()
        after = traces(model)
        for one in (before, after):  # which object a gradient is does not matter, only its values
            one["gradients"] = {name: None if g is None else g.tolist() for name, g in one["gradients"].items()}
        assert after == before, way


def test_e6_other_adapters_are_off_meanwhile(e6: None) -> None:
    model = randomise(get_peft_model(net(), E6Config(target_modules=ALL), "first"), "first").train()
    acting = model(X).logits
    model.add_adapter("second", E6Config(target_modules=ALL, way="loud"), calibration=batches())
    assert torch.equal(OUTPUTS[0], net().eval()(**batches()[0]).logits)
    assert torch.equal(model(X).logits, acting) and model.active_adapters == ["first"] and model.training
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("third", E6Config(target_modules=ALL, way="rude"), calibration=batches())
    assert list(model.peft_config) == ["first", "second"] and torch.equal(model(X).logits, acting)


def test_e6_what_cannot_be_calibrated_is_refused(e6: None) -> None:
    model = net()
    with pytest.raises(ConfigError, match="has none; put labels"):
        get_peft_model(model, E6Config(target_modules=ALL, way="gradients"), calibration=[{"x": X}])
    config = E6Config(target_modules=ALL, way="gradients", unused="nowhere")
    with pytest.raises(TargetError, match="nowhere: the start has tensors for it"):
        get_peft_model(model, config, calibration=batches())
    assert type(model) is Net
    with registered(plugin(E7Config, Pair)), pytest.raises(ConfigError, match="does not start from data"):
        get_peft_model(model, E7Config(target_modules=ALL), calibration=batches())


# -- E7: base edits that are none --------------------------------------------------------------------------------------


class E7Config(TargetedConfig):
    peft_type: ClassVar[str] = "TOYE7"
    r: int = 2
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    start: str = "svd"


@pytest.fixture
def e7() -> Iterator[None]:
    with registered(plugin(E7Config, Pair)):
        yield


STARTS = ("svd", "qr")


@pytest.mark.parametrize("start", STARTS)
def test_t5_unload_leaves_the_base_as_it_came(e7: None, start: str) -> None:
    """The start is taken from the weights, and yet nothing is ever written into them."""
    before, plain = weights(net()), net()(X).logits
    model = get_peft_model(net(), E7Config(target_modules=ALL, start=start))
    # float32: the start and what is subtracted are the same numbers, multiplied in the same order.
    assert torch.equal(model(X).logits, plain)
    assert same(weights(model), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith((".a", ".b")) for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(X, labels=Y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(X).logits
    assert not torch.equal(expected, plain) and same(weights(model), before)
    model.merge_adapter()
    # float32: one rounding of the weights.
    torch.testing.assert_close(model(X).logits, expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert same(weights(model), before) and torch.equal(model(X).logits, expected)
    base = model.unload()
    assert type(base) is Net and same(weights(base), before) and torch.equal(base(X).logits, plain)


@pytest.mark.parametrize("start", STARTS)
def test_e7_a_start_from_the_weights_comes_back_on_a_fresh_base(e7: None, start: str, tmp_path: Path) -> None:
    model = randomise(get_peft_model(net(), E7Config(target_modules=ALL, start=start)))
    model.save_pretrained(tmp_path)
    for base in (net(), copy.deepcopy(model).unload()):
        again = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(again(X).logits, model(X).logits)


def test_e7_two_starts_share_one_base(e7: None) -> None:
    alone: dict[str, Tensor] = {}
    for start in STARTS:
        model = randomise(get_peft_model(net(), E7Config(target_modules=ALL, start=start), start), start)
        alone[start] = model(X).logits
    model = get_peft_model(net(), E7Config(target_modules=ALL, start="svd"), "svd")
    model.add_adapter("qr", E7Config(target_modules=ALL, start="qr"))  # of the base's weights, not of what is active
    for start in STARTS:
        randomise(model, start)
    order: list[Callable[[], Any]] = [lambda: model.delete_adapter("svd"), lambda: model.unload()]
    for start in (*STARTS, *STARTS):
        model.set_adapter(start)
        assert torch.equal(model(X).logits, alone[start])
    mixed = model(X, adapter_names=["svd", "qr", "__base__"]).logits
    expected = torch.stack([alone["svd"][0], alone["qr"][1], net()(X).logits[2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)  # float32: batches of another size
    model.set_adapter(["svd", "qr"])
    both = model(X).logits
    model.merge_adapter()
    torch.testing.assert_close(model(X).logits, both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    for step in order:
        step()
        assert same(weights(model), weights(net()))

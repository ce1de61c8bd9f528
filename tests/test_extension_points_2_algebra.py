"""Extension point E16: adapters made of adapters, proved by small methods of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_core import (
    Adapter,
    AdapterNameError,
    AdapterNotFoundError,
    CombineError,
    MergeError,
    PeftModel,
    TargetedConfig,
    get_peft_model,
)
from tests.tiny_transformers import make
from tests.toy_algebra import LABELS, PLUGINS, DenseConfig, GainConfig, GateConfig, RankConfig, X
from tests.toy_plugins import net, plugin, randomise, registered


class FusionConfig(GateConfig):
    """Attention over the outputs of adapters, the layer's own output being the query."""

    peft_type: ClassVar[str] = "TOYFUSION"


class Fusion(Adapter):
    starts_as_base = False

    def __init__(self, layer: Any, config: FusionConfig) -> None:
        super().__init__(layer)
        self.experts, n = config.experts, layer.out_features
        self.query, self.key, self.value = (layer.parameter(n, n) for _ in range(3))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query)
        nn.init.normal_(self.key)
        nn.init.eye_(self.value)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        out = base(x)
        outputs = torch.stack([base.through(name, x, out=out) for name in self.experts], -2)
        scores = ((outputs @ self.key.t()) @ (out @ self.query.t())[..., None]).softmax(-2)
        return (scores * (outputs @ self.value.t())).sum(-2)


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*PLUGINS, plugin(FusionConfig, Fusion)):
        yield


EXPERTS = ("low", "gain", "dense")
CONFIGS: dict[str, type[TargetedConfig]] = {"low": RankConfig, "gain": GainConfig, "dense": DenseConfig}


def experts(up: str = "up") -> Any:
    """An additive adapter, a multiplicative one, and one in the weights."""
    model = net()
    for seed, name in enumerate(EXPERTS, 1):
        config = CONFIGS[name](target_modules=[up])
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            get_peft_model(model, config, name)
        randomise(model, name, seed=seed)
    return model


def gated(kind: type[GateConfig], **fields: Any) -> Any:
    model = experts()
    model.add_adapter("gate", kind(target_modules=["up"], **{"experts": EXPERTS, **fields}))
    model.set_adapter("gate")
    return randomise(model, "gate", seed=9).train()


def each_by_hand(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the first layer gives for each expert."""
    up, site = net().blocks[0].up, model._peft.sites["blocks.0.up"]
    low, gain, dense = (site.of(name)[""] for name in EXPERTS)
    out = up(x)
    return out, [out + x @ low.a.t() @ low.b.t(), out * gain.gain, linear(x, up.weight + dense.diff, up.bias)]


@pytest.mark.parametrize("kind", [GateConfig, FusionConfig])
def test_an_adapter_over_adapters_of_any_kind(kind: type[GateConfig]) -> None:
    model = gated(kind)
    site = model._peft.sites["blocks.0.up"]
    out, outputs = each_by_hand(model, X)
    own = site.of("gate")[""]
    if kind is GateConfig:
        gates = (X @ own.gate.t()).softmax(-1)
        expected = sum(gates[:, i, None] * one for i, one in enumerate(outputs))
    else:
        query = out @ own.query.t()
        scores = torch.stack([(query * (one @ own.key.t())).sum(-1) for one in outputs], -1).softmax(-1)
        expected = sum(scores[:, i, None] * (one @ own.value.t()) for i, one in enumerate(outputs))
    torch.testing.assert_close(site(X), expected, rtol=1e-5, atol=1e-6)
    assert (site(X) - out).abs().max() > 0.01
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X).logits, model(X).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [GateConfig, FusionConfig])
def test_it_trains_alone_and_comes_back_with_its_parts(kind: type[GateConfig], tmp_path: Path) -> None:
    model = gated(kind)
    before = {name: [p.clone() for p in model._peft.record(name).parameters()] for name in (*EXPERTS, "gate")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X, labels=LABELS).loss.backward()
        optimizer.step()
    for name, old in before.items():
        for parameter, was in zip(model._peft.record(name).parameters(), old, strict=True):
            assert torch.equal(parameter, was) is (name != "gate")
            assert (parameter.grad is None) is (name != "gate")
    model.eval().save_pretrained(tmp_path)
    with pytest.raises(AdapterNotFoundError, match="'gate' is made of other adapters.*'low', 'gain', 'dense'"):
        PeftModel.from_pretrained(net(), tmp_path / "gate", "gate")
    again = PeftModel.from_pretrained(net(), tmp_path / "low", "low")
    for name in ("gain", "dense", "gate"):
        again.load_adapter(tmp_path / name, name)
    again.set_adapter("gate")
    assert torch.equal(again(X).logits, model(X).logits)


def test_parts_cannot_be_deleted_while_they_are_used() -> None:
    model = gated(GateConfig)
    expected = model(X).logits
    for name in EXPERTS:
        with pytest.raises(AdapterNameError, match=rf"'{name}' is part of \['gate'\]"):
            model.delete_adapter(name)
    assert torch.equal(model(X).logits, expected)
    model.delete_adapter("gate")
    for name in EXPERTS:
        model.delete_adapter(name)
    assert torch.equal(model(X).logits, net()(X).logits)
    with pytest.raises(AdapterNotFoundError, match="lacks"):
        get_peft_model(net(), GateConfig(target_modules=["up"], experts=("low",)))


def test_a_gate_over_gates_and_over_what_is_not_everywhere() -> None:
    model = gated(GateConfig)
    model.add_adapter("elsewhere", RankConfig(target_modules=["blocks.1.up"]))
    randomise(model, "elsewhere", seed=4)
    model.add_adapter("outer", GateConfig(target_modules=["up"], experts=("gate", "elsewhere")))
    model.set_adapter("outer")
    site = model._peft.sites["blocks.0.up"]
    out, outputs = each_by_hand(model, X)
    inner, outer = (site.of(name)[""].gate for name in ("gate", "outer"))
    gates = (X @ inner.t()).softmax(-1)
    combined = sum(gates[:, i, None] * one for i, one in enumerate(outputs))
    over = (X @ outer.t()).softmax(-1)
    torch.testing.assert_close(site(X), over[:, :1] * combined + over[:, 1:] * out, rtol=1e-5, atol=1e-6)


def test_a_gate_over_an_active_adapter_further_in() -> None:
    """What is further in is what the parts start from."""
    model = gated(GateConfig, experts=("low", "dense"))
    model.set_adapter(["gain", "gate"])
    site = model._peft.sites["blocks.0.up"]
    low, gain, dense = (site.of(name)[""] for name in EXPERTS)

    with pytest.raises(MergeError, match="Gain cannot be expressed"):  # a weight adapter needs weights further in
        site(X)
    model.delete_adapter("gate")
    model.add_adapter("gate", GateConfig(target_modules=["up"], experts=("low", "gain")))
    model.set_adapter(["dense", "gate"])
    gate = site.of("gate")[""].gate
    up = net().blocks[0].up
    out = linear(X, up.weight + dense.diff, up.bias)
    gates = (X @ gate.t()).softmax(-1)
    expected = gates[:, :1] * (out + low.delta(X)) + gates[:, 1:] * (out * gain.gain)
    torch.testing.assert_close(site(X), expected, rtol=1e-5, atol=1e-6)


class ResidualConfig(GainConfig):
    """An adapter of a whole block, by its output."""

    peft_type: ClassVar[str] = "TOYRESIDUAL"


class Residual(Adapter):
    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__(layer)
        self.down, self.up = layer.parameter(3, 16), layer.parameter(16, 3)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return out + torch.tanh(out @ self.down.t()) @ self.up.t()


class BlockGate(Adapter):
    starts_as_base = False

    def __init__(self, layer: Any, config: GateConfig) -> None:
        super().__init__(layer)
        self.experts = config.experts
        self.gate = layer.parameter(len(config.experts), 16)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        outputs = torch.stack([base.through(name, *args, out=out, **kwargs) for name in self.experts], -1)
        return (outputs * (out @ self.gate.t()).softmax(-1)[..., None, :]).sum(-1)


class BlockGateConfig(GateConfig):
    peft_type: ClassVar[str] = "TOYBLOCKGATE"


def test_a_gate_over_adapters_of_blocks_runs_each_block_once() -> None:
    """Blocks that run again would leave their keys in the cache again."""
    with registered(plugin(ResidualConfig, Residual), plugin(BlockGateConfig, BlockGate)):
        model = get_peft_model(make("llama"), ResidualConfig(target_modules=r"model\.layers\.\d"), "a")
        model.add_adapter("b", ResidualConfig(target_modules=r"model\.layers\.\d"))
        randomise(model, "a", seed=1)
        randomise(model, "b", seed=2)
        model.add_adapter("gate", BlockGateConfig(target_modules=r"model\.layers\.\d", experts=("a", "b")))
        model.set_adapter("gate")
        randomise(model, "gate", seed=3)
        runs: list[int] = []
        model.model.layers[0].base_layer.register_forward_hook(lambda *_: runs.append(1))
        ids = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4]])
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        found = model.generate(ids, **options)
        assert len(runs) == 4
        assert torch.equal(found, model.generate(ids, use_cache=False, **options))
        with model.disable_adapter():
            assert not torch.equal(found, model.generate(ids, **options))


# -- combination into a new adapter ------------------------------------------------------------------------------------


def test_a_weighted_sum_becomes_an_adapter_of_another_method(tmp_path: Path) -> None:
    model = get_peft_model(net(), RankConfig(target_modules=["up", "down"]), "a")
    model.add_adapter("b", RankConfig(target_modules=["up"], r=3))
    randomise(model, "a", seed=1)
    randomise(model, "b", seed=2)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "c", "sum", scale=3.0)
    assert model.active_adapters == ["a"] and type(model.peft_config["c"]) is DenseConfig
    plain = net()
    with torch.no_grad():
        for path, site in model._peft.sites.items():
            weight = plain.get_submodule(path).weight
            weight += 1.5 * site.of("a")[""].weight_delta()
            weight -= 6.0 * site.of("b")[""].weight_delta() if site.of("b") else 0.0
    model.set_adapter("c")
    torch.testing.assert_close(model(X).logits, plain(X).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    again = PeftModel.from_pretrained(net(), tmp_path / "c", "c")
    assert torch.equal(again(X).logits, model(X).logits)
    with pytest.raises(CombineError, match="cannot be combined by 'ties'.*'toylow'"):
        model.add_weighted_adapter(["a"], [1.0], "d", "ties")
    with pytest.raises(CombineError, match="as many finite weights"):
        model.add_weighted_adapter(["a", "b"], [1.0], "d", "sum")
    with pytest.raises(AttributeError, match="weight_delta") as found:  # a dense one has none: the plugin's mistake
        model.add_weighted_adapter(["c"], [1.0], "d", "sum")
    assert "Raised in peft_combine, called for the method 'toydense'" in found.value.__notes__[0]
    assert sorted(model.peft_config) == ["a", "b", "c"]

"""Extension point E12: strategies of the model's call, proved by small methods of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peft_core import Adapter, AdapterConfig, PeftModel, SiteRequest, TargetedConfig, get_peft_model
from tests.tiny_transformers import gradients, make
from tests.toy_plugins import net, plugin, randomise, registered

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


# -- E12: a clean pass first, which says how much of each expert every token gets --------------------------------------


class GateConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOYGATE"
    at: str = ""
    experts: int = 2


class Expert(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: GateConfig) -> None:
        super().__init__(layer)
        self.read = layer.parameter(config.experts, layer.in_features)
        self.write = layer.parameter(config.experts, layer.out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.read)
        nn.init.zeros_(self.write)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        gates = base.call.scratch[self.shared, "gates"]
        return base(*args, **kwargs) + (args[0] @ self.read.t() * gates) @ self.write


class Strategy(Adapter):
    """Runs what it wraps twice: without adapters, with a cache of its own, and then as it is."""

    uses_call = True

    def __init__(self, layer: Any, config: GateConfig) -> None:
        super().__init__(layer)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = base.call
        clean = {k: v for k, v in kwargs.items() if k not in ("labels", "cache")}
        clean["use_cache"] = kwargs.get("cache") is not None
        if clean["use_cache"]:
            if (self.shared, "cache") not in call.carried:
                call.carried[self.shared, "cache"] = follower(kwargs["cache"])
            clean["cache"] = call.carried[self.shared, "cache"]
        with torch.no_grad(), base.adapters():
            hidden = base(*args, **clean, output_hidden_states=True).hidden_states[-1]
        call.scratch[self.shared, "gates"] = self.shared.router(hidden).softmax(-1)
        return base(*args, **kwargs)


def follower(cache: Any) -> DynamicCache:
    """A second cache, whose rows go where those of the first one go."""
    own, reorder = DynamicCache(), cache.reorder_cache

    def both(index: Tensor) -> None:
        reorder(index)
        own.reorder_cache(index)

    cache.reorder_cache = both
    return own


def gate_sites(config: GateConfig) -> list[SiteRequest]:
    experts = [SiteRequest(f"model.layers.{i}.self_attn.{p}_proj") for i in range(2) for p in "qv"]
    return [SiteRequest(config.at, meta={"strategy": True}), *experts]


def gate_prepare(config: GateConfig, model: Any, shared: nn.Module) -> None:
    shared.router = nn.Linear(model.config.hidden_size, config.experts)


def gate_adapter(layer: Any, config: GateConfig) -> Adapter:
    return (Strategy if layer.request.meta.get("strategy") else Expert)(layer, config)


# -- E12: a side network that reads every block, the base being run without gradients ----------------------------------


class SideConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOYSIDE"
    width: int = 5


class Tap(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: SideConfig) -> None:
        super().__init__(layer)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        base.call.scratch.setdefault((self.shared, "taps"), []).append(out)
        return out


class Side(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: SideConfig) -> None:
        super().__init__(layer)
        hidden = layer.request.meta["hidden"]
        self.down = layer.parameter(2, config.width, hidden)
        self.up = layer.parameter(hidden, config.width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = base(*args, **kwargs)
        state: Any = 0.0
        for down, tap in zip(self.down, base.call.scratch[self.shared, "taps"], strict=True):
            assert not tap.requires_grad
            state = torch.tanh(state + tap @ down.t())
        out.last_hidden_state = out.last_hidden_state + state @ self.up.t()
        return out


def side_sites(model: Any) -> list[SiteRequest]:
    taps = [SiteRequest(f"model.layers.{index}") for index in range(2)]
    return [SiteRequest("model", meta={"hidden": model.config.hidden_size}), *taps]


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    gate = plugin(GateConfig, gate_adapter, peft_sites=gate_sites, peft_prepare=gate_prepare)
    side = plugin(
        SideConfig,
        lambda layer, config: (Side if layer.path == "model" else Tap)(layer, config),
        peft_sites=side_sites,
    )
    with registered(gate, side):
        yield


def gated(at: str) -> Any:
    torch.manual_seed(0)
    return randomise(get_peft_model(make("llama"), GateConfig(at=at)), std=1.0)


@pytest.mark.parametrize("at", ["", "model"])
def test_a_clean_pass_decides_how_the_adapters_act(at: str) -> None:
    model = gated(at)
    ids = IDS[:1, :1]  # one token: its gates are one pair of numbers, and the experts a change of the weights
    with model.disable_adapter():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    gates = model._peft.record("default").shared.router(hidden).softmax(-1)[0, 0]
    plain = make("llama")
    with torch.no_grad():
        for path, site in model._peft.sites.items():
            for expert in site.of("default").values():
                if isinstance(expert, Expert):
                    update = torch.einsum("k,ko,ki->oi", gates, expert.write, expert.read)
                    plain.get_submodule(path).weight += update
    # Float32 sums in another order, of weights of size 10 and more.
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-3)
    assert (model(ids).logits - make("llama")(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("at", ["", "model"])
@pytest.mark.parametrize("beams", [1, 3])
def test_t1_a_strategy_is_reached_by_generation(at: str, beams: int) -> None:
    model = gated(at)
    given = {"input_ids": IDS, "attention_mask": MASK}
    found = model.generate(**given, num_beams=beams, **OPTIONS)
    assert torch.equal(found, model.generate(**given, num_beams=beams, use_cache=False, **OPTIONS))
    with model.disable_adapter():
        assert not torch.equal(found, model.generate(**given, num_beams=beams, **OPTIONS))
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in given.items()}
        assert torch.equal(model.generate(**one, num_beams=beams, **OPTIONS)[0], found[row])
    ids = IDS[:1]  # and it is what calls one by one give
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert beams > 1 or torch.equal(ids[0], found[0])


@pytest.mark.parametrize("at", ["", "model"])
def test_a_strategy_trains_and_comes_back_from_a_file(at: str, tmp_path: Path) -> None:
    model = gated(at).train()
    model(IDS, labels=IDS).loss.backward()
    assert gradients(model)["_peft_shared.default.router.weight"].abs().sum() > 0
    assert all(grad is not None for grad in gradients(model).values())
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("at", ["", "model"])
def test_t2_notes_of_a_call_are_there_in_the_recompute(at: str) -> None:
    """Reentrant checkpoints cannot: gradients of what a block reads beside its inputs run through the notes twice."""
    grads = []
    for checkpoint in (False, True):
        model = gated(at).train()
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
        (model(IDS, labels=IDS).loss + model(IDS.flip(1), labels=IDS).loss).backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("how", ["", "model", "side"])
def test_a_strategy_compiles_without_a_graph_break(how: str) -> None:
    model = gated(how) if how != "side" else randomise(get_peft_model(make("llama"), SideConfig()), std=2.0)
    expected = model(IDS).logits  # and transformers sets up its capture of hidden states, under a lock
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-5, atol=1e-4)  # sums in another order
    torch._dynamo.reset()


def test_another_pass_has_other_adapters_and_notes_and_losses_of_its_own() -> None:
    scratches: list[Any] = []

    class Twice(Strategy):
        def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
            base.call.scratch["mine"] = 1
            with torch.no_grad(), base.adapters("terms"):
                inner = base(*args, **kwargs)
            out = base(*args, **kwargs)
            assert torch.equal(out.logits, model.base_logits)
            assert list(base.call.scratch) == ["mine"]
            return inner

    class TwiceConfig(GateConfig):
        peft_type: ClassVar[str] = "TOYTWICE"

    class Spy(Adapter):
        uses_call = True

        def __init__(self, layer: Any, config: SpyConfig) -> None:
            super().__init__(layer)
            self.scale = layer.parameter(1)

        def reset_parameters(self) -> None:
            nn.init.ones_(self.scale)

        def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
            scratches.append(base.call.scratch)
            base.call.scratch["spy"] = 1
            out = base(*args, **kwargs) * self.scale
            base.call.add_loss("size", out.square().sum())
            return out

    class SpyConfig(TargetedConfig):
        peft_type: ClassVar[str] = "TOYLOSSSPY"

    x = torch.randn(3, 6)
    with registered(plugin(TwiceConfig, Twice, peft_sites=lambda: [SiteRequest("")]), plugin(SpyConfig, Spy)):
        model = net()
        base = model(x).logits
        get_peft_model(model, SpyConfig(target_modules=["up"]), "terms")
        randomise(model, "terms")
        expected = model(x).logits
        model.add_adapter("twice", TwiceConfig())
        model.set_adapter("twice")
        model.base_logits = base
        model.train()
        scratches.clear()
        assert torch.equal(model(x).logits, expected) and not torch.equal(expected, base)
        assert scratches == [{"spy": 1}] * 2 and scratches[0] is scratches[1]
        assert model.adapter_losses() == {}


def test_a_side_network_reads_every_block(tmp_path: Path) -> None:
    model = randomise(get_peft_model(make("llama"), SideConfig()), std=2.0)
    given = {"input_ids": IDS, "attention_mask": MASK}
    logits = model(**given).logits
    plain = make("llama")(**given, output_hidden_states=True)
    side = model._peft.sites["model"].of("default")[""]
    state: Any = 0.0
    blocks: list[Tensor] = []
    other = make("llama")
    for block in other.model.layers:
        block.register_forward_hook(lambda module, args, out: blocks.append(out))
    other(**given)
    for down, tap in zip(side.down, blocks, strict=True):
        state = torch.tanh(state + tap @ down.t())
    by_hand = other.lm_head(plain.hidden_states[-1] + state @ side.up.t())
    assert torch.equal(logits, by_hand)
    for beams in (1, 3):
        found = model.generate(**given, num_beams=beams, **OPTIONS)
        assert torch.equal(found, model.generate(**given, num_beams=beams, use_cache=False, **OPTIONS))
        with model.disable_adapter():
            assert not torch.equal(found, model.generate(**given, num_beams=beams, **OPTIONS))
    model.train()
    model(**given, labels=IDS).loss.backward()
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make("llama"), tmp_path)(**given).logits, logits)

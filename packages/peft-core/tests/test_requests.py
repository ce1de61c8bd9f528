"""Requests: one adapter per row, recompute in backward, concurrent calls."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from toys import GainConfig, MixConfig, ShiftConfig, SumConfig, net, randomise

from peft_core import AdapterNotFoundError, RequestError, get_peft_model

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]])
UP_DOWN = SumConfig(target_modules=["up", "down"])

pytestmark = pytest.mark.usefixtures("toy_methods")


def test_rows_equal_separate_runs():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("gain", GainConfig(target_modules=["up", "classifier"]))
    model.add_adapter("shift", ShiftConfig(target_modules=["norm"]))
    for seed, name in enumerate(["default", "gain", "shift"]):
        randomise(model, name, seed=seed)
    names = ["gain", "__base__", "default", "shift"]
    mixed = model(IDS, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(IDS[row : row + 1])
        else:
            model.set_adapter(name)
            alone = model(IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    alone = model(IDS)
    assert torch.equal(model(IDS), alone)  # the request left nothing behind
    torch.testing.assert_close(model(IDS, adapter_names=["default"] * 4), alone, rtol=0, atol=0)
    # Two rows of the batch per name, as under beam search.
    torch.testing.assert_close(model(IDS, adapter_names=["default", "gain"])[:2], alone[:2], rtol=1e-5, atol=1e-6)


def test_rows_are_refused_where_they_cannot_be_right():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("mix", MixConfig(target_modules=["up"]))
    before = model(IDS)
    with pytest.raises(RequestError, match="3 entries.*4 rows"):
        model(IDS, adapter_names=["default"] * 3)
    with pytest.raises(AdapterNotFoundError, match="'defualt'.*Did you mean 'default'"):
        model(IDS, adapter_names=["defualt"] * 4)
    with pytest.raises(RequestError, match="mixes the rows"):
        model(IDS, adapter_names=["default", "mix", "mix", "mix"])
    assert torch.equal(model(IDS), before)


def test_rows_get_gradients_of_their_own_adapter():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("b", UP_DOWN)
    model.set_adapter(["default", "b"])
    randomise(model, "default", seed=1)
    randomise(model, "b", seed=2)
    model(IDS, adapter_names=["default", "default", "b", "b"])[2:].sum().backward()
    grads = {name: [p.grad for p in model._peft.adapters[name].parameters()] for name in ("default", "b")}
    assert all(g is not None and g.abs().sum() > 0 for g in grads["b"])
    assert all(g is None or g.abs().sum() == 0 for g in grads["default"])


def test_concurrent_calls_never_see_each_others_adapters():
    model = get_peft_model(net(), UP_DOWN)
    model.add_adapter("b", GainConfig(target_modules=["up"]))
    randomise(model, "default", seed=1)
    randomise(model, "b", seed=2)
    expected = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        expected[name] = model(IDS).detach()
    with model.disable_adapter():
        expected["__base__"] = model(IDS).detach()
    wrong: list[str] = []

    def serve(name):
        for _ in range(100):
            with torch.no_grad():
                if not torch.allclose(model(IDS, adapter_names=[name] * 4), expected[name], atol=1e-6):
                    wrong.append(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve, args=(name,)) for name in expected for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("kind", ["reentrant", "saved"])
def test_activation_checkpointing_recomputes_under_the_forwards_request(kind):
    def grads(checkpoint):
        model = get_peft_model(net(checkpoint=checkpoint), UP_DOWN)
        model.add_adapter("b", GainConfig(target_modules=["up"]))
        model.set_adapter(["default", "b"])
        randomise(model, "default", seed=1)
        randomise(model, "b", seed=2)
        model.embed.weight.requires_grad_(True)  # a reentrant checkpoint needs an input with a gradient
        loss = model(IDS, adapter_names=["b", "default", "__base__", "b"]).square().sum()
        with torch.no_grad():
            model(IDS)  # an evaluation between forward and backward changes nothing
        with model.disable_adapter():
            loss.backward()
        return [p.grad for n in ("default", "b") for p in model._peft.adapters[n].parameters()]

    for plain, recomputed in zip(grads(None), grads(kind), strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["reentrant", "saved"])
def test_a_recompute_that_could_be_anybodys_is_refused(kind):
    model = get_peft_model(net(checkpoint=kind), UP_DOWN)
    model.add_adapter("b", GainConfig(target_modules=["up"]))
    model.set_adapter(["default", "b"])
    model.embed.weight.requires_grad_(True)
    first = model(IDS, adapter_names=["b"] * 4)
    second = model(IDS, adapter_names=["default"] * 4)
    with pytest.raises(RequestError, match="different adapters came before one backward"):
        (first + second).sum().backward()
    for names in (["b"] * 4, ["default"] * 4):  # one after the other is fine, as often as one likes
        model(IDS, adapter_names=names).sum().backward()
    (model(IDS) + model(IDS)).sum().backward()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "per head"])
@pytest.mark.parametrize("length", [2, 4])
def test_rows_of_attention_with_masks(batch_first, mask, length):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x, **masks):
            return self.attention(x, x, value=x, **masks)

    torch.manual_seed(0)
    model = get_peft_model(Model(), ShiftConfig(target_modules=["attention"]))
    model.add_adapter("other", ShiftConfig(target_modules=["attention"]))
    randomise(model)
    randomise(model, "other", seed=2)
    batch = torch.randn(4, length, 8)
    padding = torch.zeros(4, length, dtype=torch.bool)
    padding[1, 0] = padding[2, 1] = True
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal},
        "per head": {"attn_mask": causal.repeat(8, 1, 1)},
    }[mask]

    def call(**names):
        out, weights = model(batch if batch_first else batch.transpose(0, 1), **masks, **names)
        return (out if batch_first else out.transpose(0, 1)), weights

    names = ["default", "other", "__base__", "other"]
    mixed = call(adapter_names=names)
    for row, name in enumerate(names):
        alone = call(adapter_names=[name] * 4)
        for one, other in zip(mixed, alone, strict=True):
            torch.testing.assert_close(one[row], other[row], rtol=1e-5, atol=1e-5)

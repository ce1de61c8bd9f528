"""Extension point E17: one adapter per row, proved by small methods of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import Adapter, RequestError, get_peft_model
from tests.tiny_transformers import make
from tests.toy_algebra import LABELS, PLUGINS, GainConfig, GateConfig, Low, MixConfig, RankConfig, X
from tests.toy_plugins import net, plugin, randomise, registered


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    Low.batched.clear()
    with registered(*PLUGINS):
        yield


def many(*ranks: int, model: Any = None, targets: Sequence[str] = ("up", "down")) -> Any:
    model = net() if model is None else model
    for number, r in enumerate(ranks):
        config = RankConfig(target_modules=list(targets), r=r)
        if number:
            model.add_adapter(f"a{number}", config)
        else:
            get_peft_model(model, config, "a0")
        randomise(model, f"a{number}", seed=number + 1)
    return model


def alone(model: Any, names: Sequence[str], x: Tensor) -> Tensor:
    return torch.cat([model(x[i : i + 1], adapter_names=[name]).logits for i, name in enumerate(names)])


def test_rows_of_one_class_are_computed_at_once() -> None:
    model = many(2, 2, 2)
    names = ["a2", "__base__", "a0", "a2"]
    mixed = model(X, adapter_names=names).logits
    assert Low.batched == [2] * 4, "once at each layer, for the two adapters that occur"
    Low.batched.clear()
    torch.testing.assert_close(mixed, alone(model, names, X), rtol=1e-5, atol=1e-6)
    assert not Low.batched, "a single adapter needs no batching"
    model.set_adapter(["a0", "a1", "a2"])
    mixed = model(X, adapter_names=names, labels=LABELS).loss
    split = nn.functional.cross_entropy(alone(model, names, X), LABELS)
    weights = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(mixed, weights, allow_unused=True),
        torch.autograd.grad(split, weights, allow_unused=True),
        strict=True,
    ):
        if other is None:  # the adapter of no row
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", ["rank", "class", "two parts"])
def test_the_core_splits_the_batch_where_a_method_cannot(other: str) -> None:
    model = many(2, 3 if other == "rank" else 2)
    if other == "class":
        model.add_adapter("gain", GainConfig(target_modules=["up", "down"]))
        randomise(model, "gain")
    names = ["a0", "a1" if other != "class" else "gain", "__base__", "a0"]
    if other == "two parts":
        model._peft.sites["blocks.0.up"].attach("a0", "more", model._peft.sites["blocks.0.up"].of("a0")[""])
    Low.batched.clear()
    mixed = model(X, adapter_names=names).logits
    assert len(Low.batched) == (3 if other == "two parts" else 0)
    torch.testing.assert_close(mixed, alone(model, names, X), rtol=1e-5, atol=1e-6)


def test_rows_are_batched_in_generation_and_over_beams() -> None:
    model = many(2, 2, model=make("llama"), targets=("q_proj", "v_proj"))
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10]])
    names = ["a1", "a0", "__base__"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    found = model.generate(ids, adapter_names=names, **options)
    assert Low.batched == [2] * 4 * 4  # layers, and steps
    for row, name in enumerate(names):
        one = model.generate(ids[row : row + 1], adapter_names=[name], **options)
        assert torch.equal(found[row], one[0])
    assert not torch.equal(found, model.generate(ids, adapter_names=names[::-1], **options))


class ResidualConfig(GainConfig):
    """An adapter of a whole block, by its output."""

    peft_type: ClassVar[str] = "TOYBLOCKROWS"


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


class Batched(Residual):
    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        down = torch.stack([adapter.down for adapter in adapters])[index]
        up = torch.stack([adapter.up for adapter in adapters])[index] * (index >= 0)[:, None, None]
        return out + torch.tanh(out @ down.mT) @ up.mT


@pytest.mark.parametrize("kind", [Residual, Batched])
def test_blocks_that_fill_a_cache_are_not_run_on_some_rows_at_a_time(kind: type[Residual]) -> None:
    """Two groups of equal size would leave their keys one behind the other, and nobody would notice."""
    with registered(plugin(ResidualConfig, kind)):
        model = get_peft_model(make("llama"), ResidualConfig(target_modules=r"model\.layers\.\d"), "a")
        model.add_adapter("b", ResidualConfig(target_modules=r"model\.layers\.\d"))
        randomise(model, "a", seed=1)
        randomise(model, "b", seed=2)
        ids = torch.tensor([[5, 6, 7, 8], [9, 5, 3, 4], [6, 6, 9, 10], [3, 4, 5, 6]])
        names = ["a", "a", "b", "b"]
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        uncached = model.generate(ids, adapter_names=names, use_cache=False, **options)
        for row, name in enumerate(names):
            one = model.generate(ids[row : row + 1], adapter_names=[name], **options)
            assert torch.equal(uncached[row], one[0])
        if kind is Batched:
            assert torch.equal(model.generate(ids, adapter_names=names, **options), uncached)
        else:
            with pytest.raises(RequestError, match=r"model.layers.0: .* cannot share the cache.*use_cache=False"):
                model.generate(ids, adapter_names=names, **options)


def test_t8_a_method_whose_rows_depend_on_the_batch_is_refused() -> None:
    model = randomise(get_peft_model(net(), MixConfig(target_modules=["up"])))
    whole = model(X).logits
    assert (whole[:2] - model(X[:2]).logits).abs().max() > 1e-3, "it does depend on the batch"
    model.add_adapter("low", RankConfig(target_modules=["up"]))
    for names in (["default", "low", "low", "low"], ["default"] * 4):
        with pytest.raises(RequestError, match="blocks.0.up: Mix mixes the rows of a batch"):
            model(X, adapter_names=names)
    model.add_adapter("gate", GateConfig(target_modules=["up"], experts=("default", "low")))
    model.set_adapter("gate")
    model(X)
    with pytest.raises(RequestError, match="blocks.0.up: Mix mixes the rows of a batch"):
        model(X, adapter_names=["gate", "low", "low", "gate"])
    model.set_adapter("default")
    assert torch.equal(model(X).logits, whole)

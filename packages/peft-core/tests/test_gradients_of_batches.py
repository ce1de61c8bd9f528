"""`Batches.gradients`: what it gives, one at a time where that is asked for, and what it leaves as it was."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import ConfigError
from peft_core.calibration import Batches
from peft_core.layers import BaseLayer, SiteRequest, layer_of


class Net(nn.Module):
    """Two layers, one of them used twice under a second name, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.last = nn.Linear(6, 4)
        self.idle = nn.Linear(6, 6)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))
        return {"out": out} if labels is None else {"loss": F.cross_entropy(out, labels)}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def views(model: nn.Module, *paths: str) -> list[BaseLayer]:
    return [layer_of(model.get_submodule(path), SiteRequest(path)) for path in paths]


BATCHES = [{"x": torch.randn(5, 6), "labels": torch.arange(5) % 4} for _ in range(3)]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_gradients_of_each_batch(streamed: bool) -> None:
    model, reference = net(), net()
    model.last.weight.requires_grad_(False)
    given: dict[str, Tensor] = {}
    batches = Batches(model, BATCHES, "a")
    layers = views(model, "first", "again", "last", "idle")
    seen = 0
    for found in batches.gradients(layers, each=(lambda path, g: given.update({path: g})) if streamed else None):
        loss = reference(**BATCHES[seen])["loss"]
        first, last = torch.autograd.grad(loss, [reference.first.weight, reference.last.weight])
        assert not (streamed and found)
        values = given if streamed else found
        assert set(values) == {"first", "again", "last"}
        assert torch.equal(values["first"], first) and torch.equal(values["again"], first)
        assert torch.equal(values["last"], last)
        seen += 1
        given.clear()
        # Between batches the model is as it was.
        assert not model.last.weight.requires_grad and model.first.bias.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
    assert seen == len(BATCHES)


def test_one_gradient_is_in_memory_at_a_time() -> None:
    model = net()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def each(path: str, gradient: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(one() is not None for one in alive))

    list(Batches(model, BATCHES, "a").gradients(views(model, "first", "last"), each=each))
    assert len(alive) == 2 * len(BATCHES) and most == 1


def test_gradients_that_are_there_stay_and_none_are_added() -> None:
    model = net()
    kept = model.first.weight.grad = torch.ones(6, 6)
    model.idle.weight.grad = torch.zeros(6, 6)
    with pytest.raises(ConfigError, match="put labels into the batches"):
        list(Batches(model, [*BATCHES, {"x": torch.zeros(1, 6)}], "a").gradients(views(model, "first")))
    assert model.first.weight.grad is kept and torch.equal(kept, torch.ones(6, 6))
    assert model.last.weight.grad is None and all(parameter.requires_grad for parameter in model.parameters())
    assert not model.first.weight._post_accumulate_grad_hooks


def test_layers_that_no_batch_reaches_have_none() -> None:
    assert list(Batches(net(), BATCHES, "a").gradients(views(net(), "idle"))) == [{}, {}, {}]

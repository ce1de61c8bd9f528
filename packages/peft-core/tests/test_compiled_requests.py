"""A compiled graph cannot ask which thread it runs on: what it computes is right for its call, or refused."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import nn
from toys import GainConfig, SumConfig, net, randomise, toys

from peft_core import RequestError, get_peft_model
from peft_core.routing import Request

# Dynamo looks at the inputs of a graph that goes on after a break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]])
ROWS = ["a", "b", "__base__", "a"]


@pytest.fixture(autouse=True)
def _fresh():
    with toys():
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def two(model=None):
    model = get_peft_model(model or net(), SumConfig(target_modules=["up", "down"]), "a")
    model.add_adapter("b", GainConfig(target_modules=["up"]))
    randomise(model, "a", seed=1)
    randomise(model, "b", seed=2)
    return model


@contextlib.contextmanager
def elsewhere(model, *requests):
    """Calls with these requests are in flight on other threads."""
    end, ready = threading.Event(), threading.Barrier(len(requests) + 1)

    def call(request):
        with model._peft.routing.use(request):
            ready.wait()
            end.wait()

    threads = [threading.Thread(target=call, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)  # the compiler may sum in another order


def test_rows_inside_a_compiled_function():
    model, twin = two(), two()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(ids, names=None):
        return model(ids, adapter_names=names) * 2

    for names in (None, ROWS, ["b"] * 4, None):
        close(step(IDS, names), twin(IDS, adapter_names=names) * 2)
    assert model._peft.routing._traced is None and not model._peft.routing._in_flight


def test_a_failing_compiled_call_leaves_nothing_behind():
    model = two()
    compiled = torch.compile(model, backend="aot_eager")
    for names in (["a"] * 3, ["nobody"] * 4):
        with pytest.raises(Exception, match="3 entries|nobody"):
            compiled(IDS, adapter_names=names)
        assert model._peft.routing._traced is None
        close(compiled(IDS), model(IDS))


def test_a_compiled_model_beside_calls_on_other_threads():
    model, twin = two(), two()
    expected, rows = twin(IDS), twin(IDS, adapter_names=ROWS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(IDS), expected)
    with elsewhere(model, Request(("a",))):  # they use what the standing choice is
        close(compiled(IDS), expected)
    with elsewhere(model, Request(("a",), ("b", "b"))):
        with pytest.raises(Exception, match="cannot run within, or beside"):
            compiled(IDS)
        close(compiled(IDS, adapter_names=ROWS), rows)  # names given to the call itself are certain
        close(torch.compile(model, backend="aot_eager")(IDS), expected)  # may leave the graph, and does
    close(compiled(IDS), expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_layers_beside_calls_on_other_threads(fullgraph):
    model, twin = two(), two()
    for block in model.layers:
        block.compile(fullgraph=fullgraph, backend="aot_eager")
    for names in (None, ROWS):
        close(model(IDS, adapter_names=names), twin(IDS, adapter_names=names))
    with elsewhere(model, Request(("b",))):
        for names in (None, ROWS):
            if fullgraph:
                with pytest.raises(Exception, match="on several threads"):
                    model(IDS, adapter_names=names)
            else:
                close(model(IDS, adapter_names=names), twin(IDS, adapter_names=names))
    close(model(IDS), twin(IDS))


class Broken(nn.Module):
    """A model that no compiler gets into one graph; what comes after the break is adapted too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.down(x)


class Outside(Broken):
    """And here one adapted layer is outside of any graph."""

    def forward(self, x):
        return outside(self.down, self.up(x))


@torch._dynamo.disable
def outside(layer, x):
    return layer(x)


def test_a_graph_that_breaks():
    x = torch.randn(3, 4)
    names = ["a", "b", "__base__"]
    model, twin = two(Broken()), two(Broken())
    compiled = torch.compile(model, backend="aot_eager")
    for given in (None, names):
        close(compiled(x, adapter_names=given), twin(x, adapter_names=given))
    model, twin = two(Outside()), two(Outside())
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled(x), twin(x))
    with pytest.raises(RequestError, match="graph broke"):
        compiled(x, adapter_names=names)
    close(model(x, adapter_names=names), twin(x, adapter_names=names))

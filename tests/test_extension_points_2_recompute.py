"""Extension point E11 where a call is more than a forward: recompute, compilation, threads; merging for one task."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import RequestError, get_peft_model
from tests.tiny_transformers import gradients
from tests.toy_plugins import net, plugin, randomise, registered
from tests.toy_requests import IDS, PLUGINS, TASKS, TaskAdapter, TaskConfig, X, tasked


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*PLUGINS):
        yield


def test_threads_keep_their_tasks_apart() -> None:
    model = tasked()
    with torch.no_grad():
        expected = {task: model(IDS, task_ids=task).logits for task in range(3)}
    wrong: list[int] = []

    def serve(task: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(IDS, task_ids=[task] * 3).logits, expected[task]):
                    wrong.append(task)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve, args=(task,)) for task in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("thread", [False, True])
def test_t2_recompute_finds_the_task_of_its_own_forward(reentrant: bool, thread: bool) -> None:
    """Two forwards with different tasks before one backward, which may run on another thread."""

    def trained(checkpoint: bool) -> dict[str, Tensor]:
        model = tasked().train()
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = [model(IDS, labels=IDS, task_ids=tasks).loss for tasks in (TASKS, [0, 0, 2])]
        with torch.no_grad():
            model(IDS, task_ids=[1, 1, 1])  # another call between forward and backward
        run = sum(losses).backward
        if thread:
            other = threading.Thread(target=run)
            other.start()
            other.join()
        else:
            run()
        return gradients(model)

    plain, recomputed = trained(False), trained(True)
    assert any(grad.abs().sum() > 0 for grad in plain.values())
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name


def test_t2_request_arguments_break_no_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for model, given in ((tasked(), (IDS,)), (get_peft_model(net(), TaskConfig(target_modules=["up"])), (X,))):
        randomise(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for tasks in (TASKS, [0, 1, 2]):
            expected = model(*given, task_ids=torch.tensor(tasks)).logits
            # The compiler may sum in another order.
            torch.testing.assert_close(
                compiled(*given, task_ids=torch.tensor(tasks)).logits, expected, rtol=1e-5, atol=1e-4
            )
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["reentrant", "saved"])
def test_t2_a_model_that_checkpoints_by_itself(kind: str) -> None:
    """Its blocks call torch's function, which nobody told whose recompute it is."""

    def model_of(checkpoint: str | None) -> Any:
        model = get_peft_model(net(checkpoint=checkpoint), TaskConfig(target_modules=["up"]))
        return randomise(model).train()

    x = X.clone().requires_grad_()  # a reentrant checkpoint needs an input with a gradient
    labels = torch.tensor([0, 1, 2])
    grads = []
    for checkpoint in (None, kind):
        model = model_of(checkpoint)
        loss = model(x, labels=labels, task_ids=TASKS).loss
        with torch.no_grad():
            model(x, task_ids=[1, 1, 1])
        loss.backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    losses = [model(x, labels=labels, task_ids=tasks).loss for tasks in (TASKS, [0, 0, 2])]
    with pytest.raises(RequestError, match="different adapters came before one backward"):
        sum(losses).backward()
    model(x, labels=labels, task_ids=TASKS).loss.backward()


def test_merging_for_one_task() -> None:
    def peft_merge(adapter: Any, params: dict[str, Tensor], arguments: Any) -> dict[str, Tensor]:
        update = torch.outer(adapter.write[arguments["task_ids"]], adapter.read)
        return {**params, "weight": params["weight"] + update}

    class MergedConfig(TaskConfig):
        peft_type = "TOYMERGED"

    with registered(plugin(MergedConfig, TaskAdapter, peft_merge=peft_merge)):
        model = randomise(get_peft_model(net(), MergedConfig(target_modules=["up", "down"])))
        expected = {task: model(X, task_ids=task).logits for task in range(3)}
        for task in range(3):
            model.merge_adapter(task_ids=task)
            for given in ({}, {"task_ids": task}, {"task_ids": [task] * 3}):
                # The sum is in the weight now.
                torch.testing.assert_close(model(X, **given).logits, expected[task], rtol=1e-5, atol=1e-5)
            with pytest.raises(RequestError, match="merged for .* another task_ids"):
                model(X, task_ids=[task, task, (task + 1) % 3])
            model.unmerge_adapter()
        assert torch.equal(model(X, task_ids=0).logits, expected[0])
        with pytest.raises(RequestError, match="'task_idz'.*Did you mean 'task_ids'"):
            model.merge_adapter(task_idz=0)
        plain = model.merge_and_unload(task_ids=2)
        torch.testing.assert_close(plain(X).logits, expected[2], rtol=1e-5, atol=1e-5)

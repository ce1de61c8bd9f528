"""Trap T12: a tensor that gets no gradient in the last block, under DistributedDataParallel on two processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peft_core import Adapter, AdapterConfig, SiteRequest, get_peft_model
from tests.toy_plugins import net, plugin, randomise, registered

# Two processes that import torch: some ten seconds.
pytestmark = pytest.mark.slow


class RelayConfig(AdapterConfig):
    """Each block leaves a state for the next one; `says` that the last one's is in vain."""

    peft_type: ClassVar[str] = "TOYRELAY"
    request_arguments: ClassVar[tuple[str, ...]] = ("strength",)
    says: bool = False


class Relay(Adapter):
    uses_call = True

    def __init__(self, layer: Any, config: RelayConfig) -> None:
        super().__init__(layer)
        self.read = layer.parameter(3, 6)
        self.write = layer.parameter(6, 3)
        self.update = layer.parameter(3, 6)
        if config.says and layer.request.meta["last"]:
            self.update.requires_grad_(False)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call, key = base.call, (self.shared, "state")
        state = torch.tanh(args[0] @ self.read.t()) + call.scratch.get(key, 0.0)
        out = base(*args, **kwargs) + call.rows("strength", len(state))[:, None] * state @ self.write.t()
        call.scratch[key] = out @ self.update.t()
        return out

    def losses(self) -> Mapping[str, Tensor]:
        return {"size": self.write.square().sum()}


def sites() -> list[SiteRequest]:
    return [SiteRequest(f"blocks.{index}", meta={"last": index == 1}) for index in range(2)]


def relayed(says: bool) -> Any:
    model = randomise(get_peft_model(net(), RelayConfig(says=says))).train()
    assert model._peft.record("default").adapters[1].update.requires_grad is not says
    return model


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 4, torch.linspace(0.5, 2, 8)


METHOD = plugin(RelayConfig, Relay, peft_sites=sites)


def work(rank: int, folder: str) -> None:
    """What one of two processes does: three ways to wrap, two steps each; results go to a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")  # of the processes' own, which no test looks at
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    with registered(METHOD):
        for name, says, find in (("plain", False, False), ("find", False, True), ("says", True, False)):
            model = relayed(says)
            wrapped = DistributedDataParallel(model, find_unused_parameters=find)
            part = slice(4 * rank, 4 * rank + 4)
            x, labels, strength = (value[part] for value in data())
            try:
                for _ in range(2):
                    model.zero_grad()
                    wrapped(x, labels=labels, strength=strength).loss.backward()
                found[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            except RuntimeError as error:
                found[name] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_t12_a_tensor_without_gradient_in_the_last_block(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    with registered(METHOD):
        model = relayed(False)
        x, labels, strength = data()
        model(x, labels=labels, strength=strength).loss.backward()
    unused = "blocks.1.adapters.default.update"
    alone = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert unused not in alone and len(alone) == 5
    for results in found:
        assert "find_unused_parameters=True" in results["plain"]  # torch's own advice
        for way in ("find", "says"):
            for name, grad in alone.items():
                # The mean of two halves, summed in another order.
                torch.testing.assert_close(results[way][name], grad, rtol=1e-5, atol=1e-7)
        assert set(results["says"]) == set(alone)
        assert set(results["find"]) - {unused} == set(alone)

"""Hidden states that transformers records are those of the adapted model, at whatever module adapters sit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peft_core import Adapter, AdapterConfig, SiteRequest, get_peft_model
from tests.tiny_transformers import batch, make
from tests.toy_plugins import plugin, registered

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer", "t5": "encoder.block"}


class LiftConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOYLIFT"
    paths: tuple[str, ...]


class Lift(Adapter):
    """Adds something to what a block gives."""

    starts_as_base = False

    def __init__(self, layer: Any, config: LiftConfig) -> None:
        super().__init__(layer)
        self.lift = layer.parameter(1)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lift, 0.5)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return (lifted(out[0], self.lift), *out[1:]) if isinstance(out, tuple) else lifted(out, self.lift)


def lifted(states: Tensor, by: Any) -> Tensor:
    """More with each feature: a norm would take off what all have in common."""
    return states + by * torch.linspace(0, 1, states.shape[-1])


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    def peft_sites(config: LiftConfig) -> list[SiteRequest]:
        return [SiteRequest(path) for path in config.paths]

    with registered(plugin(LiftConfig, Lift, peft_sites=peft_sites)):
        yield


def states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    found: tuple[Tensor, ...] = out.encoder_hidden_states if "encoder_hidden_states" in out else out.hidden_states
    return found


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_hidden_states_are_what_leaves_the_block(kind: str, asked_before: bool) -> None:
    model, inputs = make(kind), batch(kind)
    plain = states(make(kind), inputs)
    if asked_before:  # then the hooks are there already
        states(model, inputs)
    get_peft_model(model, LiftConfig(paths=(f"{BLOCKS[kind]}.0",)))
    left: list[Any] = []
    model.get_submodule(f"{BLOCKS[kind]}.0").register_forward_hook(lambda module, args, out: left.append(out))
    for _ in range(2):
        found = states(model, inputs)
        first = left.pop()
        assert torch.equal(found[1], first[0] if isinstance(first, tuple) else first)
        torch.testing.assert_close(found[1], lifted(plain[1], 0.5))
        assert torch.equal(found[0], plain[0]) and len(found) == len(plain)
        assert not torch.allclose(found[-1], plain[-1], atol=1e-3)
    with model.disable_adapter():
        assert all(torch.equal(a, b) for a, b in zip(states(model, inputs), plain, strict=True))
    model.unload()
    assert all(torch.equal(a, b) for a, b in zip(states(model, inputs), plain, strict=True))

"""A gate over adapters keeps the contract, on single layers too: `prepare` gives every model its experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_core import Adapter, LinearLayer, as_compute
from peft_core.testing import MethodContract
from peft_ia3 import IA3Config
from peft_lora import LoraConfig
from tests.toy_algebra import GateConfig
from tests.toy_plugins import plugin


class Gate(Adapter):
    """Mixture of LoRA Experts (Wu et al. 2024, https://arxiv.org/abs/2404.13628): a gate reads the layer's input."""

    starts_as_base = False

    def __init__(self, layer: Any, config: GateConfig) -> None:
        super().__init__(layer)
        if not isinstance(layer, LinearLayer):
            raise layer.refuse("the gate is for linear layers")
        self.experts = config.experts
        self.gate = layer.parameter(len(self.experts), layer.in_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = args
        out: Tensor = base(x)
        gates = (x @ as_compute(self.gate, x).t()).softmax(-1)
        for at, name in enumerate(self.experts):
            delta = base.delta(name, x, out=out)
            out = out if delta is None else out + gates[..., at, None] * delta
        return out


class TestGate(MethodContract):
    config = GateConfig(experts=("low", "scale"))
    plugin = plugin(GateConfig, Gate)
    mergeable = False

    def prepare(self, model: nn.Module, targets: list[str]) -> None:
        self.put(model, "low", LoraConfig(r=4, target_modules=targets))
        self.put(model, "scale", IA3Config(target_modules=targets[:1], feedforward_modules=[]))

"""IA3 keeps the contract of methods: rescaling at the output, at the input, and from a noisy start.

Read by `python -m peft_core check --contract`, and by the package's own tests.
"""

from __future__ import annotations

from typing import Any

from peft_core.testing import MethodContract

from .ia3 import IA3Config

LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


class TestOutputs(MethodContract):
    config = IA3Config(feedforward_modules=[])
    layer_kinds = LAYERS


class TestInputs(MethodContract):
    config = IA3Config(feedforward_modules=[])
    layer_kinds = LAYERS

    def configure(self, targets: list[str]) -> Any:
        return self.config.resolve(target_modules=targets, feedforward_modules=targets)


class TestNoisyStart(MethodContract):
    config = IA3Config(feedforward_modules=[], init_ia3_weights=False)
    layer_kinds = ("linear", "conv1d", "conv2d", "conv3d")

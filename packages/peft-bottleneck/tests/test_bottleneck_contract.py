"""Bottleneck adapters keep the contract of methods: behind layers named by hand, and placed by roles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bottleneck_toys import toy_roles

from peft_bottleneck import BottleneckConfig
from peft_core.testing import MethodContract


class TestBehindLayers(MethodContract):
    config = BottleneckConfig(reduction_factor=2, non_linearity="tanh")
    mergeable = False


class TestFromTheBase(MethodContract):
    config = BottleneckConfig(reduction_factor=4, non_linearity="gelu", init_weights="mam_adapter", scaling=4)
    mergeable = False


class TestWithEverything(MethodContract):
    config = BottleneckConfig(
        reduction_factor=2,
        non_linearity="swish",
        init_weights="houlsby",
        scaling="learned",
        ln_before=True,
        ln_after=True,
    )
    mergeable = False


class _ByRoles(MethodContract):
    """On the suite's model, whose blocks are feed-forward networks behind a norm, adapters go where the roles say.

    Its tests of single layers name the layer, and so prove the form behind layers once more.
    """

    mergeable = False

    @pytest.fixture(autouse=True)
    def roles(self) -> Iterator[None]:
        with toy_roles():
            yield

    def base(self, dtype: torch.dtype = torch.float64) -> Any:
        model: Any = super().base(dtype)
        model.config = {"model_type": "toy_tiny_net"}
        return model

    def configure(self, targets: list[str]) -> Any:
        if set(targets) <= {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}:
            return self.config
        return BottleneckConfig(target_modules=targets, reduction_factor=2, non_linearity="tanh")

    def test_what_is_proved_here(self) -> None:
        found = [type(adapter).__name__ for adapter in self.adapted()._peft.adapters["a"].adapters]
        assert found == ["ResidualRecorder", "ResidualAdapter"] * 2


class TestParallel(_ByRoles):
    config = BottleneckConfig.scaled_parallel(non_linearity="tanh")


class TestOnTheSum(_ByRoles):
    config = BottleneckConfig.pfeiffer(reduction_factor=2, non_linearity="tanh")


del MethodContract, _ByRoles

"""Bottleneck adapters keep the contract of methods: behind layers named by hand, with and without extras."""

from __future__ import annotations

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

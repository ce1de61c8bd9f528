"""The contract suite for authors of methods. Needs pytest, which `pip install "peft-core[testing]"`
brings."""

from __future__ import annotations

try:
    import pytest as pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the contract suite is a suite of pytest, which is not installed; run: pip install 'peft-core[testing]'",
        name=error.name,
    ) from None

from .catalogue import CASES, KINDS, Case
from .contract import MethodContract
from .models import TinyNet
from .setup import Setup

__all__ = ["CASES", "KINDS", "Case", "MethodContract", "Setup", "TinyNet"]

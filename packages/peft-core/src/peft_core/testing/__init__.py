"""The contract suite for authors of methods. Needs pytest, which `pip install "peft-core[testing]"`
brings."""

from __future__ import annotations

from .catalogue import CASES, KINDS, Case
from .contract import MethodContract
from .models import TinyNet

__all__ = ["CASES", "KINDS", "Case", "MethodContract", "TinyNet"]

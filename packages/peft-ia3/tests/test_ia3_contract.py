"""IA3 keeps the contract of methods: rescaling at the output, at the input, and from a noisy start."""

from peft_ia3.ia3_contract import TestInputs, TestNoisyStart, TestOutputs

__all__ = ["TestInputs", "TestNoisyStart", "TestOutputs"]

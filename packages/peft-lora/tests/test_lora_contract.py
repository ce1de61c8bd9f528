"""LoRA and DoRA keep the contract of methods, on every kind of layer they adapt."""

from peft_lora.lora_contract import (
    TestActivatedLora,
    TestDora,
    TestLora,
    TestLoraBias,
    TestOrthogonalStart,
    TestQaLora,
    TestRandomStart,
)

__all__ = [
    "TestActivatedLora",
    "TestDora",
    "TestLora",
    "TestLoraBias",
    "TestOrthogonalStart",
    "TestQaLora",
    "TestRandomStart",
]

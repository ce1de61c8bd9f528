"""LoRA and DoRA keep the contract of methods, on every kind of layer they adapt."""

from peft_lora.lora_contract import TestDora, TestLora, TestLoraBias, TestOrthogonalStart, TestRandomStart

__all__ = ["TestDora", "TestLora", "TestLoraBias", "TestOrthogonalStart", "TestRandomStart"]

"""X-LoRA under the contract that ships with the package."""

from peft_lora.xlora_contract import TestLayerwise, TestTrainedExperts, TestXLora

__all__ = ["TestLayerwise", "TestTrainedExperts", "TestXLora"]

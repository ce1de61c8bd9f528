"""Prompt methods for peft-core. It holds no method yet: prompt tuning, prefix tuning and P-tuning are planned."""

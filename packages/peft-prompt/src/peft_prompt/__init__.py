"""Prompt methods for peft-core. It holds no method yet: prompt tuning and its relatives are planned."""

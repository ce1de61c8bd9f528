"""Orthogonal fine-tuning for peft-core. It holds no method yet: OFT and BOFT are planned."""

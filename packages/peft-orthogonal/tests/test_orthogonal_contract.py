"""OFT and BOFT keep the contract of methods, on every kind of layer they adapt."""

from peft_orthogonal.boft_contract import TestBoft, TestBoftBiases, TestButterflies
from peft_orthogonal.oft_contract import TestConstrained, TestOft, TestOftBiases, TestOftExact, TestOftShared

__all__ = [
    "TestBoft",
    "TestBoftBiases",
    "TestButterflies",
    "TestConstrained",
    "TestOft",
    "TestOftBiases",
    "TestOftExact",
    "TestOftShared",
]

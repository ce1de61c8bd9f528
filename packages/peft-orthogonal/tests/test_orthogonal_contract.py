"""OFT and BOFT keep the contract of methods, on every kind of layer they adapt."""

from peft_orthogonal.boft_contract import TestBoft, TestButterflies
from peft_orthogonal.oft_contract import TestConstrained, TestOft, TestOftExact, TestOftShared

__all__ = ["TestBoft", "TestButterflies", "TestConstrained", "TestOft", "TestOftExact", "TestOftShared"]

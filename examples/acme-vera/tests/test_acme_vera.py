from acme_vera import VeraConfig

from peft_core.testing import MethodContract


class TestVera(MethodContract):
    config = VeraConfig(r=4)

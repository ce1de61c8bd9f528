"""The contract of a method, as a suite of tests."""

from __future__ import annotations

import pytest

from .behaviour import Behaviour
from .features import Features
from .files import Files
from .gradients import Gradients
from .language import LanguageModel
from .layers import Layers
from .merging import Merging
from .training import Training


@pytest.mark.filterwarnings("error")
class MethodContract(Behaviour, Gradients, Merging, Files, Layers, Features, Training, LanguageModel):
    """Everything the core promises its users in a method's name.

    The author of a method writes one short class per config worth proving, in a file that pytest collects:

        from peft_core.testing import MethodContract
        from acme import AcmeConfig

        class TestAcme(MethodContract):
            config = AcmeConfig(r=4)

    and says in class attributes what is different about the method: the kinds of layers it adapts, that it cannot be
    merged, and the like. They are those of `Setup`: `help(peft_core.testing.Setup)` explains each, and so does the
    page docs/contract.md. A failure names the promise, what was seen, and where to look. The suite works on small
    models in float64 on the CPU, and treats warnings as errors.
    """

"""The table of roles names modules that the models of transformers have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peft_core.architectures import ARCHITECTURES
from peft_core.patterns import NameMatcher

# Not in transformers: models whose code comes with their weights, or that have been taken out.
ELSEWHERE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}

# Roles of models in their older form, and why they stay.
ABSENT = {
    ("mixtral", "gate"): "experts are stacked parameters since transformers 5; defaults are those of before",
    ("mixtral", "up"): "the same",
    ("mixtral", "down"): "the same",
}

# Names of variants: the language model of blip-2 may be T5 (`q`) or OPT (`q_proj`).
VARIANTS = {"blip-2": {"q", "k", "v"}}

# Heads are on the classes for their tasks.
WITH_HEAD = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM, transformers.AutoModel)


def build(model_type: str) -> nn.Module:
    config: Any = transformers.CONFIG_MAPPING[model_type]()
    for cls in WITH_HEAD:
        if type(config) in cls._model_mapping:
            with torch.device("meta"):
                model: nn.Module = cls.from_config(config)
            return model
    raise AssertionError(model_type)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() - ELSEWHERE))
def test_every_role_names_modules(model_type: str) -> None:
    model = build(model_type)
    paths = [path for path, _ in model.named_modules() if path]
    for role, names in ARCHITECTURES[model_type].items():
        if role == "within":
            assert any(NameMatcher(names[0], what=role, trusted=True).matches(path) for path in paths)
            continue
        matcher = NameMatcher(names, what=role, trusted=True)
        found = [path for path in paths if matcher.matches(path)]
        if (model_type, role) in ABSENT:
            assert not found, f"{role} is there again"
        else:
            assert found, f"no module of {model_type} is named {names} ({role})"
            assert set(matcher.unmatched()) <= VARIANTS.get(model_type, set()), role

"""The defaults that follow from roles are those of Hugging Face PEFT, name by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft.utils import constants

from peft_core.architectures import default_targets, role_names
from peft_core.config import TargetedConfig
from peft_ia3 import IA3Config
from peft_lora import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig
from peft_orthogonal import BOFTConfig, OFTConfig

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "default_targets.json").read_text())

# HF's tables of these are copies of LoRA's.
TABLES = dict.fromkeys(("loha", "lokr", "oft", "boft"), "lora")
METHODS: list[tuple[str, type[TargetedConfig]]] = [
    ("lora", LoraConfig),
    ("adalora", AdaLoraConfig),
    ("loha", LoHaConfig),
    ("lokr", LoKrConfig),
    ("oft", OFTConfig),
    ("boft", BOFTConfig),
    ("ia3", IA3Config),
]

TARGETS = [
    pytest.param(config, model_type, expected, id=f"{method}-{model_type}")
    for method, config in METHODS
    for model_type, expected in DATA[TABLES.get(method, method)].items()
]


def plain(names: str | tuple[str, ...] | None) -> str | list[str] | None:
    """Names in the fixture's form: their order means nothing, how often they occur does."""
    return sorted(names) if isinstance(names, tuple) else names


@pytest.mark.parametrize(("config", "model_type", "expected"), TARGETS)
def test_targets_are_those_of_hf(config: type, model_type: str, expected: str | list[str]) -> None:
    assert plain(default_targets(config, model_type)) == expected


@pytest.mark.parametrize("model_type", DATA["ia3_feedforward"])
def test_feed_forward_layers_are_those_of_hf(model_type: str) -> None:
    """They are the down projections among the targets; mt5 has none there."""
    down = set(role_names(model_type, ["down"]) or ())
    assert sorted(down & set(default_targets(IA3Config, model_type) or ())) == DATA["ia3_feedforward"][model_type]


@pytest.mark.parametrize(
    ("method", "table"),
    [
        ("lora", constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        ("loha", constants.TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING),
        ("lokr", constants.TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING),
        ("oft", constants.TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING),
        ("boft", constants.TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING),
        ("adalora", constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING),
        ("ia3", constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
        ("ia3_feedforward", constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING),
    ],
)
def test_the_fixture_is_what_the_installed_hf_peft_has(method: str, table: dict[str, Any]) -> None:
    found = {key: names if isinstance(names, str) else sorted(names) for key, names in table.items()}
    assert found == DATA[TABLES.get(method, method)]

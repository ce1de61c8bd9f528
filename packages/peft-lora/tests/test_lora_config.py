"""LoRA's config: what a user may write, what a file may hold, and what each is told."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_core import AdapterConfig, get_peft_model, load_method
from peft_core.errors import CheckpointMismatchError, ConfigError, TargetError
from peft_core.layers import SiteRequest, layer_of
from peft_lora import LoraConfig, lora


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: the rank is a positive integer"),
        ({"r": True}, "r: "),
        ({"r": 2.5}, "r: "),
        ({"lora_alpha": 0}, "never do anything"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"lora_dropout": -0.1}, "below 1"),
        ({"bias": "some"}, "bias: "),
        ({"init_lora_weights": "pisa"}, "one of gaussian"),
        ({"rank_pattern": {"q_proj": 0}}, "'q_proj' is not a positive integer"),
        ({"alpha_pattern": {"q_proj": 0}}, "'q_proj'"),
        ({"target_modules": []}, "nothing else is named"),
        ({"lora_bias": True, "use_dora": True}, "exclude each other"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "True or False only"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"rank": 4}, "no such field"),
        ({"lora_alfa": 4}, "Did you mean 'lora_alpha'"),
        ({"use_kasa": True}, "no such field"),
        ({"use_qalora": True, "use_dora": True}, "exclude each other"),
        ({"use_qalora": True, "alora_invocation_tokens": [1]}, "exclude each other"),
        ({"use_qalora": True, "init_lora_weights": "pissa"}, "no start 'pissa'"),
        ({"alora_invocation_tokens": []}, "an empty list"),
        ({"layer_replication": []}, "an empty list"),
        ({"qalora_group_size": 0}, "a positive integer"),
    ],
    ids=str,
)
def test_what_a_user_cannot_write(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize("start", ["eva", "mica", "orthogonal", "gaussian", "pissa", "pissa_niter_16", True, False])
def test_files_have_settings_of_starts_that_were_not_used(start: Any) -> None:
    data = {"init_lora_weights": start, "eva_config": {"rho": 3.0, "tau": 0.99}, "loftq_config": {"loftq_bits": 4}}
    config = LoraConfig.from_dict(data)
    assert config.init_lora_weights == start and config.loftq_config is None
    assert (config.eva_config is not None) == (start == "eva")
    assert config.resolve(target_modules=("q_proj",)).init_lora_weights == start
    # Readers of other libraries know them as well, so they are written only where they say something.
    assert ("eva_config" in config.to_dict()) == (start == "eva")


def test_options_of_other_writers_that_are_switched_off_pass() -> None:
    off = {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "qalora_group_size": 16,
        "use_qalora": False,
        "layer_replication": None,
        "alora_invocation_tokens": None,
        "trainable_token_indices": [],
        "target_parameters": [],
        "runtime_config": {"ephemeral_gpu_offload": True},
    }
    assert LoraConfig.from_dict(off) == LoraConfig()


@pytest.mark.parametrize("key", ["use_bdlora", "arrow_config", "kasa_config", "velora_config", "megatron_config"])
def test_active_options_that_are_unknown_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        LoraConfig.from_dict({key: [[0, 4]]})


def test_parameters_take_the_place_of_the_default_modules() -> None:
    assert LoraConfig(target_parameters=["w"]).target_modules == ()
    assert LoraConfig.from_dict({"target_parameters": ["w"], "target_modules": None}).target_modules == ()
    assert LoraConfig(target_parameters=["w"], target_modules=["q"]).target_modules == ("q",)
    assert LoraConfig(trainable_token_indices=[1]).target_modules is None


def test_round_trip(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=2.5, target_modules=["a"], rank_pattern={"b": 2}, trainable_token_indices={"e": [1, 2]}
    )
    config.save_pretrained(tmp_path)
    read = AdapterConfig.from_pretrained(tmp_path)
    assert read == config
    assert isinstance(read, LoraConfig)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert load_method("lora").config_class is LoraConfig


def test_patterns_that_match_nothing() -> None:
    """From the user a mistake; in a file, what another model's layers were called."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 4, "k": 2})
    with pytest.raises(TargetError, match=r"rank_pattern: 'v_proj' .*alpha_pattern: 'k'"):
        get_peft_model(model, config)
    layer = layer_of(model["q_proj"], SiteRequest("q_proj"))
    lora.peft_prepare(config=config, layers=[layer], shared=nn.Module(), trusted=False)


def test_how_weights_are_stored_is_seen_from_the_layers() -> None:
    """`fan_in_fan_out` is written as it is; a value that contradicts the layers is corrected, with a warning."""
    model = get_peft_model(nn.Sequential(Conv1D(4, 4)), LoraConfig(target_modules=["0"]))
    assert model.peft_config["default"].fan_in_fan_out is True
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True, but 0 \(Linear\)"):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], fan_in_fan_out=True))
    assert model.peft_config["default"].fan_in_fan_out is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed = nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4))
        get_peft_model(mixed, LoraConfig(target_modules=["0", "1"], fan_in_fan_out=True))


def test_layers_that_lora_has_no_form_for() -> None:
    with pytest.raises(TargetError, match=r"0 \(LayerNorm\): LoRA adapts .*target_parameters"):
        get_peft_model(nn.Sequential(nn.LayerNorm(4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(TargetError, match="lora_bias"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), LoraConfig(target_modules=["0"], lora_bias=True))
    with pytest.raises(TargetError, match="kind linear or attention"):
        get_peft_model(
            nn.Sequential(nn.Embedding(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights="orthogonal")
        )
    with pytest.raises(TargetError, match="even rank"):
        get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=3, target_modules=["0"], init_lora_weights="orthogonal")
        )


def test_a_files_rank_is_looked_at_before_anything_of_its_size_is_made() -> None:
    config = LoraConfig(r=2**40, target_modules=["layer"])
    layer = layer_of(nn.Linear(4, 4), SiteRequest("layer"))
    shared = nn.Module()
    lora.peft_prepare(config=config, layers=[layer], shared=shared, trusted=False)
    with pytest.raises(CheckpointMismatchError, match=r"layer.lora_A.weight: the config asks for 1099511627776 rows"):
        lora.peft_build(
            config=config, layer=layer, shared=shared, tensors={"lora_A.weight": torch.empty(4, 4, device="meta")}
        )


def test_the_package_imports_nothing_by_itself() -> None:
    code = "import sys, peft_lora; print(*(name in sys.modules for name in ('torch', 'pydantic')), *dir(peft_lora))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith("False False ") and "LoraConfig" in out

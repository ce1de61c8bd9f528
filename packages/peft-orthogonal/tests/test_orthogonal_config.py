"""The configs of OFT and BOFT, and the sizes of blocks that a layer admits."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from peft_core import ConfigError, TargetError, get_peft_model, plan
from peft_orthogonal import BOFTConfig, OFTConfig
from peft_orthogonal.sizes import admissible


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (OFTConfig, {"r": 8}, r"oft_block_size=32, r=8"),
        (OFTConfig, {"oft_block_size": 0}, r"oft_block_size=0, r=0"),
        (OFTConfig, {"oft_block_size": -4}, "oft_block_size is a positive integer"),
        (OFTConfig, {"module_dropout": 1.0}, "probability"),
        (OFTConfig, {"eps": 0.0}, "positive bound"),
        (OFTConfig, {"num_cayley_neumann_terms": 0}, "positive number of terms"),
        (OFTConfig, {"bias": "boft_only"}, "bias"),
        (BOFTConfig, {"boft_block_num": 8}, r"boft_block_size=4, boft_block_num=8"),
        (BOFTConfig, {"boft_n_butterfly_factor": 0}, "positive number of factors"),
        (BOFTConfig, {"boft_dropout": -0.1}, "probability"),
    ],
)
def test_what_cannot_be_is_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


def test_only_what_others_know_is_written() -> None:
    assert "round_block_size" not in OFTConfig().to_dict()
    assert OFTConfig(round_block_size=True).to_dict()["round_block_size"] is True
    # HF PEFT warns of files of the series that do not say which one is meant.
    assert OFTConfig().beside_tensors()["peft_version"] == "0.18.0"
    assert "peft_version" not in OFTConfig(use_cayley_neumann=False).beside_tensors()


@pytest.mark.parametrize(
    ("n", "groups", "factors", "sizes"),
    [
        (24, 1, 1, [2, 3, 4, 6, 8, 12, 24]),
        (24, 2, 1, [2, 3, 4, 6, 12]),
        (7, 1, 1, [7]),
        (24, 1, 2, [2, 4, 6, 12]),
        (24, 1, 3, [2, 6]),
        (24, 1, 4, []),
        (32, 1, 4, [2, 4]),
    ],
)
def test_admissible_sizes(n: int, groups: int, factors: int, sizes: list[int]) -> None:
    assert admissible(n, groups, factors) == sizes


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (
            nn.Linear(24, 4),
            OFTConfig(),
            r"oft_block_size=32 does not fit its 24 inputs\. Admissible: oft_block_size in",
        ),
        (nn.Linear(24, 4), OFTConfig(oft_block_size=0, r=5), r"r=5 .*Admissible: r in \[1, 2, 3, 4, 6, 8, 12\]"),
        (nn.Conv2d(6, 4, 3, groups=2), OFTConfig(oft_block_size=4), r"27 inputs in each of its 2 groups.*\[3, 9, 27\]"),
        (
            nn.Linear(24, 4),
            BOFTConfig(boft_n_butterfly_factor=3),
            r"boft_block_size in \[2, 6\].*round_block_size=True",
        ),
        (
            nn.Linear(24, 4),
            BOFTConfig(boft_n_butterfly_factor=4),
            "no block size does; exclude it, or use fewer factors",
        ),
        (nn.Embedding(9, 8), BOFTConfig(), "BOFT adapts linear layers and convolutions"),
        (nn.LayerNorm(8), OFTConfig(oft_block_size=4), "OFT adapts linear layers, convolutions and embeddings"),
    ],
)
def test_layers_say_what_they_admit(layer: nn.Module, config: Any, message: str) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, config.resolve(target_modules=["0"]))
    assert model[0] is layer


def test_the_switch_takes_the_nearest() -> None:
    shapes = {}
    for size in (5, 7, 10, 100):
        config = OFTConfig(oft_block_size=size, round_block_size=True, target_modules=["0"])
        model: Any = get_peft_model(nn.Sequential(nn.Linear(24, 4)), config)
        shapes[size] = tuple(model.get_adapter_state_dict()["base_model.model.0.oft_R.weight"].shape)
    # Blocks of 4, 6, 8 and 24: of two that are equally near, the smaller.
    assert shapes == {5: (6, 6), 7: (4, 15), 10: (3, 28), 100: (1, 276)}


def test_the_plan_counts() -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64))
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules="all-linear")
    assert plan(model, config).trainable == (2 * 64 * 4 + 16) + (2 * 16 * 4 + 64)

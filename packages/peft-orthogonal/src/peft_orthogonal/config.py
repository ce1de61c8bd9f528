"""The fields that OFT and BOFT share."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar

from pydantic import model_validator

from peft_core.config import TargetedConfig


class OrthogonalConfig(TargetedConfig):
    """Fields of both methods; a subclass names its two fields for the blocks in `blocks`, size before number."""

    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")
    # Those of LoRA, as in HF PEFT, so that a config without targets means the same to both.
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "btlm": ("output", "qkv"),
        "nemotron_h": ("query", "key", "value", "output"),
        "phi": ("query", "value", "up", "down"),
        "rwkv": ("key", "value", "receptance", "output"),
        "rwkv7": ("receptance", "key", "value", "output", "up", "down"),
    }
    written_if_set: ClassVar[Set[str]] = frozenset({"round_block_size"})
    blocks: ClassVar[tuple[str, str]]

    fan_in_fan_out: bool = False
    init_weights: bool = True
    round_block_size: bool = False

    @model_validator(mode="after")
    def _one_of_size_and_number(self) -> OrthogonalConfig:
        values: dict[str, Any] = {name: getattr(self, name) for name in self.blocks}
        for name, value in values.items():
            if value < 0:
                raise ValueError(f"{name} is a positive integer, or 0 for not given")
        if all(values.values()) or not any(values.values()):
            size, number = self.blocks
            raise ValueError(
                f"give the size of a block or the number of blocks, the other one as 0 ({size}={values[size]}, "
                f"{number}={values[number]}): their product is the layer's width"
            )
        return self


def check_probability(value: float) -> float:
    """Raises `ValueError`."""
    if not 0 <= value < 1:
        raise ValueError("a probability, from 0 to below 1")
    return value

"""An adapter of any method that has a delta, as a LoRA: for programs that read nothing else, and for smaller files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_core import checkpoint, layout
from peft_core.combining import combine
from peft_core.errors import PeftError
from peft_core.model import PeftModel
from peft_core.planning import Draft
from peft_lora.config import LoraConfig


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA that stands for another adapter. `config, state_dict = convert_to_lora(...)` works as well.

    `errors` are ‖ΔW - B A‖ / ‖ΔW‖ (Frobenius) by site.
    """

    config: LoraConfig
    state_dict: Mapping[str, Tensor]
    errors: Mapping[str, float]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.config, self.state_dict))


def convert_to_lora(
    model: Any, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> LoraConversion:
    """The LoRA nearest to an adapter, its tensors under the keys of a file; the model stays as it is.

    Args:
        rank: its rank; or, below 1, the share of Σ σ² that each layer is to keep, whose ranks then differ.

    Raises `CombineError` where the adapter is not one of weights alone.
    """
    draft, errors = _converted(model, rank, adapter_name, progressbar)
    return LoraConversion(_config(draft), layout.collect(draft.record), errors)


def save_as_lora(
    path: str | os.PathLike[str],
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
) -> Mapping[str, float]:
    """Write the LoRA nearest to an adapter into a directory, in place of one that is there; returns the errors.

    Arguments and errors are those of `convert_to_lora`, and `CheckpointError`.
    """
    draft, errors = _converted(model, rank, adapter_name, progressbar)
    checkpoint.save(path, draft.record, base_model_name_or_path=getattr(model, "name_or_path", None) or None)
    return errors


def _converted(model: Any, rank: int | float, name: str, progressbar: bool) -> tuple[Draft, Mapping[str, float]]:
    if not isinstance(model, PeftModel):
        raise PeftError("convert_to_lora needs a model with adapters; make one with get_peft_model(model, config)")
    options = {"svd_rank": rank, "progressbar": progressbar}
    unused = next(f"lora{i}" for i in range(len(model.peft_config) + 1) if f"lora{i}" not in model.peft_config)
    found: Any = model
    return combine(found, [name], [1.0], unused, "svd", LoraConfig(), options)


def _config(draft: Draft) -> LoraConfig:
    config = draft.record.config
    assert isinstance(config, LoraConfig)
    return config

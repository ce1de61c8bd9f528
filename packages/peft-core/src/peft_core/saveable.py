"""The part of `PeftModel` that writes adapters to files and reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from . import checkpoint
from .errors import CheckpointError, PeftError
from .layout import collect
from .loading import load_into
from .matching import LoadReport
from .records import PeftState
from .subclass import base_class


class Saveable:
    """Saving and loading."""

    _peft: PeftState

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        save_embedding_layers: bool | str = "auto",
        state_dict: Mapping[str, Any] | None = None,
        save_function: Any = None,
        max_shard_size: int | str | None = None,
        save_format: str | None = None,
    ) -> None:
        """Write adapters, and nothing of the base: `default` into the directory, others into folders of their name.

        `state_dict`, `save_function` and `max_shard_size`, which transformers' callers pass, are not needed: every
        adapter knows its tensors, and they go into one file. Tables of embeddings that were trained are parts of
        adapters (`modules_to_save`); no other is written, so `save_embedding_layers` may stay "auto", or be False.

        `save_format` names the format of another library, which an installed extension writes.

        Raises `CheckpointError` where the files cannot be written; the directory then holds what it held before.
        """
        if not safe_serialization:
            raise CheckpointError("adapters are written as safetensors only; leave out safe_serialization=False")
        if save_embedding_layers not in ("auto", False):
            raise CheckpointError(
                "save_embedding_layers: the base's tables are not written next to an adapter; train them with it, in "
                "modules_to_save, or save the base's weights (base_state_dict) in a file of their own"
            )
        state = self._peft
        records = [state.record(name) for name in (state.adapters if selected_adapters is None else selected_adapters)]
        if not is_main_process:
            return
        base_name = getattr(self, "name_or_path", None) or None
        for record in records:
            folder = Path(save_directory) if record.name == "default" else Path(save_directory) / record.name
            if save_format is not None:
                checkpoint.export(save_format, folder, record, cast(nn.Module, self))
                continue
            checkpoint.save(folder, record, base_model_name_or_path=base_name, base_class=base_class(type(self)))

    @classmethod
    def from_pretrained(cls, model: Any, model_id: Any = None, adapter_name: str = "default", **kwargs: Any) -> Any:
        """Load a saved adapter onto `model`, in place, and activate it. The model's train or eval mode stays.

        Keyword arguments are those of `load_adapter`. Raises as `load_adapter`.
        """
        if not isinstance(model, nn.Module) or model_id is None:
            own: Any = base_class(cls)
            if own is not cls and hasattr(own, "from_pretrained"):
                extra = {} if adapter_name == "default" else {"adapter_name": adapter_name}
                args = (model,) if model_id is None else (model, model_id)
                return own.from_pretrained(*args, **extra, **kwargs)
            raise PeftError("PeftModel.from_pretrained takes the base model, then the adapter's directory")
        load_into(model, model_id, adapter_name, activate=True, **kwargs)
        return model

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
    ) -> LoadReport:
        """Load a saved adapter beside those present; it is not activated.

        Keyword arguments: `is_trainable=False`; `replace=False` (take the place of an adapter of that name; tensors
        keep their identity where nothing but values changes, so optimizers go on); `strict=True` (False: load what
        fits and report the rest); `config=None` (use this config, not the file's); `subfolder`, `revision`,
        `autocast_adapter_dtype=True`.

        Raises `CheckpointError` or `CheckpointMismatchError` (missing, unknown, mis-shaped or non-finite tensors, by
        name), `ConfigError`, `TargetError`, `MethodError`; the model is then as it was.
        """
        return load_into(cast(nn.Module, self), model_id, adapter_name, activate=False, **kwargs)

    def get_adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """One adapter's tensors under the keys of its file."""
        return collect(self._peft.record(adapter_name))

"""The layout of adapter checkpoints: a directory with a config and the tensors, in Hugging Face PEFT's names.

The config is once more in the tensors' file: that file alone is a checkpoint, and its rename is the moment at which
a save happens. Keys are the matter of `layout`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import files
from .adapter_file import (
    CONFIG_KEY,
    DTYPES,
    LAYOUT,
    LAYOUT_KEY,
    WROTE_BY_KEY,
    AdapterFile,
    all_finite,
    named,
)
from .errors import CheckpointError, PeftError
from .hook_results import call_extensions
from .layout import layout
from .locating import CONFIG, WEIGHTS, is_pickle, located, no_adapter
from .plain_data import dump_json, parse_json, read_json

if TYPE_CHECKING:
    from .records import AdapterRecord


# Fields that a user may edit in the config file: none changes what the adapter computes.
EDITABLE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)


# ---- writing


def save(
    directory: str | os.PathLike[str],
    record: AdapterRecord,
    *,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    base_class: type | None = None,
) -> None:
    """Write an adapter into `directory`, in place of one that is there.

    Without a task type, the config says by its `auto_mapping` what `base_class` the model has.

    Atomic and durable: whatever happens, the directory then holds the old checkpoint or the new one. Several
    processes may save into one directory; the last one stays.

    Raises:
        CheckpointError: a tensor has no data, no elements or no finite values, and nothing was written; or
            the file system refused.
    """
    target = Path(directory)
    tensors = _tensors(record)
    if not tensors:
        raise CheckpointError(f"adapter {record.name!r} has no tensors, so there is nothing to save")
    config = record.config
    if base_model_name_or_path is not None:
        config = config.resolve(base_model_name_or_path=os.fspath(base_model_name_or_path))
    data = config.beside_tensors(inference_mode=True)
    if config.task_type is None and base_class is not None:
        data["auto_mapping"] = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    text = dump_json(data)
    parse_json(text.encode(), source=f"the config of adapter {record.name!r}")  # What no reader takes is not written.
    metadata = {"format": "pt", CONFIG_KEY: text, LAYOUT_KEY: str(LAYOUT)}
    if record.method.source.distribution is not None:
        metadata[WROTE_BY_KEY] = str(record.method.source)
    content = _serialised(tensors, metadata)

    def check(temporaries: Sequence[Path]) -> None:
        wanted = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        with AdapterFile(temporaries[0]) as written:
            found = {key: (shape, DTYPES.get(dtype)) for key, (shape, dtype) in written.shapes.items()}
        if found != wanted:
            raise CheckpointError(f"{temporaries[0]}: the file system did not keep what was written")

    try:
        files.make_directory(target)
        with files.locked(target) as alone:
            _finish_interrupted(target, alone)
            files.replace_together(target, [(WEIGHTS, content), (CONFIG, text.encode())], check)
    except OSError as error:
        raise CheckpointError(
            f"{target}: the adapter {record.name!r} could not be saved: {error}. What was there before is still whole, "
            "or the new checkpoint is; make room or choose a directory that can be written, and save again."
        ) from error


def export(save_format: str, directory: Path, record: AdapterRecord, model: nn.Module) -> None:
    """Let an extension write an adapter in a format of its own.

    Raises `CheckpointError` where no installed extension knows the format, or a tensor cannot be written.
    """
    tensors = _tensors(record)
    data = record.config.beside_tensors(inference_mode=True)
    written = call_extensions(
        "peft_export", save_format=save_format, path=directory, config=data, tensors=tensors, model=model
    )
    if not written:
        raise CheckpointError(
            f"no installed extension writes the format {save_format!r}, so nothing was written; install one that does, "
            "or leave save_format out for this library's own files"
        )


def _tensors(record: AdapterRecord) -> dict[str, Tensor]:
    """The tensors of an adapter as they are written, by their keys."""
    found = {}
    for key, slot in layout(record).items():
        may_be_empty = slot.index is not None and record.adapters[slot.index].may_be_empty
        found[key] = _storable(record.name, key, slot.tensor, may_be_empty)
    return found


def _storable(name: str, key: str, tensor: Tensor, may_be_empty: bool) -> Tensor:
    """The tensor on the CPU, contiguous, in memory of its own where it shared some."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"adapter {name!r} cannot be saved: {named(key)} {why}. Nothing was written.")

    if tensor.is_meta:
        raise refuse("is on the meta device and has no data; load or initialise the adapter first")
    if tensor.layout != torch.strided or hasattr(tensor, "full_tensor"):
        raise refuse("is sparse or sharded; gather it into one dense tensor first")
    # Where an adapter may have no elements it still has a shape; a partitioned tensor has one dimension.
    if tensor.numel() == 0 and not (may_be_empty and tensor.dim() > 1):
        raise refuse("has no elements: it is partitioned over processes and must be gathered, or its size is wrong")
    if tensor.dtype not in DTYPES.values():
        raise refuse(f"has the dtype {tensor.dtype}; files hold {', '.join(DTYPES)}")
    if not all_finite(tensor.detach()):
        raise refuse("holds NaN or infinity: the training has diverged; go back to the last good checkpoint")
    return tensor.detach().cpu()


def _serialised(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save as serialise

    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    content = memoryview(serialise(separate, metadata))
    # The library puts the metadata in an order of chance; equal adapters should give equal files.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:end]))
    ordered = {**header, "__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, content[end:]))


def _finish_interrupted(directory: Path, alone: bool) -> None:
    """Complete a save that died after its commit, and remove what others left behind."""
    weights, config = directory / WEIGHTS, directory / CONFIG
    try:
        with AdapterFile(weights) as file:
            embedded = file.embedded_config()
        entry = _journal_entry(directory, embedded) if embedded is not None else None
    except PeftError:  # None there, or one that nobody can read: it is about to be replaced.
        entry = None
    if entry is not None and not _belongs(embedded or {}, _read_config(config, lenient=True)):
        os.replace(entry, config)  # Flushed before the next commit, together with that one's journal.
    if alone:  # Otherwise they may be a living writer's.
        for name in (WEIGHTS, CONFIG):
            for stale in files.journal(directory, name):
                stale.unlink(missing_ok=True)


# ---- reading


def read(source: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None) -> AdapterFile:
    """Open an adapter: a directory, a `.safetensors` file, or the id of a hub repository ("org/name").

    Only headers and the config are read; `AdapterFile.load` reads tensors.

    Raises:
        CheckpointError: it is not there, no adapter, damaged, or its parts do not belong together.
        ConfigError: the config file is malformed.
    """
    path = located(source, subfolder, revision)
    try:
        return _read_file(path) if path.is_file() else _read_directory(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_file(path: Path) -> AdapterFile:
    if path.suffix != ".safetensors":
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise is_pickle(path)
        raise CheckpointError(f"{path}: an adapter is a directory or a .safetensors file, and this is neither")
    file = AdapterFile(path)
    try:
        config = file.embedded_config()
        if config is None:
            config = _read_config(path.parent / CONFIG)
        if config is None:
            raise CheckpointError(f"{path}: the file holds no config, and there is no {CONFIG} next to it")
        file.config = config
        _ = file.method
    except BaseException:
        file.close()
        raise
    return file


def _read_directory(directory: Path) -> AdapterFile:
    if not (directory / WEIGHTS).is_file():
        raise no_adapter(directory)
    # Without a lock first, since readers may have no right to take one. What does not fit may be a writer at
    # work between its two renames: waiting for the lock waits for that writer.
    file = _open_pair(directory)
    if file is None:
        with files.locked(directory, shared=True):
            file = _open_pair(directory)
    if file is None:
        raise CheckpointError(
            f"{directory}: {CONFIG} and {WEIGHTS} do not belong together: the config differs from the one that was "
            f"saved with the tensors. One of them was copied from elsewhere, or edited. Put the right {CONFIG} back; "
            f"or delete it to go by the copy inside {WEIGHTS}. (Only {', '.join(sorted(EDITABLE))} may be edited.)"
        )
    return file


def _open_pair(directory: Path) -> AdapterFile | None:
    """Weights and config of a directory; None where they do not belong together."""
    file = AdapterFile(directory / WEIGHTS)
    try:
        embedded = file.embedded_config()
        stored = _read_config(directory / CONFIG)
        if embedded is None and stored is None:
            raise CheckpointError(
                f"{directory}: there is no {CONFIG}, and {WEIGHTS} holds none inside. Copy both files of the adapter."
            )
        if embedded is None or stored is None or _belongs(embedded, stored):
            file.config = stored or embedded or {}
        elif _journal_entry(directory, embedded) is not None:
            file.config = embedded  # A save was interrupted after its commit.
        else:
            file.close()
            return None
        _ = file.method
    except BaseException:
        file.close()
        raise
    return file


def _read_config(path: Path, *, lenient: bool = False) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except PeftError:
        if lenient:
            return None
        raise


def _belongs(embedded: Mapping[str, Any], stored: Mapping[str, Any] | None) -> bool:
    """Whether two configs say the same about what the adapter computes."""
    return stored is not None and _essential(embedded) == _essential(stored)


def _essential(config: Mapping[str, Any]) -> dict[str, Any]:
    off: tuple[Any, ...] = (None, "", [], {})
    return {k: v for k, v in config.items() if k not in EDITABLE and v is not False and v not in off}


def _journal_entry(directory: Path, embedded: Mapping[str, Any]) -> Path | None:
    """The config file of an interrupted save whose tensors are in place."""
    for entry in files.journal(directory, CONFIG):
        if _read_config(entry, lenient=True) == embedded:
            return entry
    return None

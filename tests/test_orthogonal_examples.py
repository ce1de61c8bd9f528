"""The examples of peft-orthogonal run, shortened, as a user would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_transfer_digits() -> None:
    printed = run("examples.transfer_digits", "--quick")
    assert "102,341 parameters" in printed
    moved = {
        match[1].strip(): float(match[2])
        for match in re.finditer(r"^(.{28}) *[\d,]+ +[\d.]+ +(\S+) +[\d.]+$", printed, re.MULTILINE)
    }
    assert moved.keys() == {
        "head alone", "LoRA r=4", "OFT, blocks of 8", "BOFT, 1 factor of 4", "BOFT, 4 factors of 4",
    }  # fmt: skip
    assert moved.pop("LoRA r=4") > 1e-3
    # Cosines in float32, of weights that were rotated and rounded once more.
    assert max(moved.values()) < 5e-6


def test_hyperspherical_energy(tmp_path: Path) -> None:
    picture = tmp_path / "energy.png"
    printed = run("examples.hyperspherical_energy", "--steps=10", f"--output={picture}")
    changes = [float(line.split()[-1]) for line in printed.splitlines()]
    assert min(changes[:2]) > 1e-3
    assert max(changes[2:]) < 1e-6
    assert picture.stat().st_size > 5_000

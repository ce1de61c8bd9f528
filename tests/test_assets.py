"""Downloaded models and texts: only what was expected is kept, and CI does not pass without them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import assets

ROOT = Path(__file__).resolve().parent.parent
TEXT = "to be or not to be"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own with one asset, "play", whose package is made here instead of downloaded."""
    play = assets.Asset(
        requirement="a-play==1",
        what="a play",
        licence="none",
        folder="package/data",
        files={"acts/one.txt": hashlib.sha256(TEXT.encode()).hexdigest()},
    )
    monkeypatch.setattr(assets, "ROOT", tmp_path / "store")
    monkeypatch.setattr(assets, "ASSETS", {"play": play})
    offer(monkeypatch, {"acts/one.txt": TEXT, "unwanted.py": "raise SystemExit"})
    assets._complete.cache_clear()
    return tmp_path / "store"


def offer(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """What the package holds."""

    def install(requirement: str, target: Path) -> None:
        for name, text in files.items():
            file = target / "package/data" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    monkeypatch.setattr(assets, "_install", install)


def test_fetch_keeps_the_listed_files_only(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assets.find("play") is None
    assert assets.fetch("play") == assets.find("play") == store / "play"
    assert [file.name for file in store.rglob("*.*")] == ["one.txt"]
    offer(monkeypatch, {})  # what is there is not fetched again
    assert assets.fetch("play") == store / "play"


@pytest.mark.parametrize(
    ("files", "message"),
    [({"acts/one.txt": "not to be"}, "has SHA-256"), ({}, "holds no package/data/acts/one.txt")],
)
def test_another_package_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], message: str
) -> None:
    offer(monkeypatch, files)
    with pytest.raises(assets.AssetError, match=message):
        assets.fetch("play")
    assert list(store.iterdir()) == []


def test_a_damaged_file_is_fetched_again(store: Path) -> None:
    file = assets.fetch("play") / "acts/one.txt"
    file.write_text("not to be")
    assets._complete.cache_clear()
    assert assets.find("play") is None
    assert (assets.fetch("play") / "acts/one.txt").read_text() == TEXT


def test_main_reports_unknown_names_and_failures(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main(["opera"]) == 2
    assert "no such asset: opera; there are play" in capsys.readouterr().err
    offer(monkeypatch, {})
    assert assets.main([]) == 1
    assert "holds no" in capsys.readouterr().err


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_a_missing_asset_is_a_skip_and_in_ci_an_error(tmp_path: Path, ci: str, outcome: str) -> None:
    test = "tests/test_examples.py::test_classify_reviews"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        env={**os.environ, "PEFT_ASSETS": str(tmp_path), "CI": ci},
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout.splitlines()[-1]
    assert "`hatch run assets minilm` fetches it" in done.stdout

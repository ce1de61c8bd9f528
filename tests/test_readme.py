"""What README and other pages say is true: the code runs, commands exist, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md", "examples/*/*.md")
    for page in ROOT.glob(pattern)
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert {file.name for file in Path("adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert type(names["merged"]).__mro__[0] is type(names["base"]())


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_scripts_of_the_workspace(page: str) -> None:
    scripts = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["envs"]["default"]["scripts"]
    assert set(re.findall(r"hatch run (\w+)", read(page))) <= set(scripts)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", read(page)):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_table_of_packages_is_complete() -> None:
    assert sorted(re.findall(r"^\| \[(peft-\w+)\]", read("README.md"), re.MULTILINE)) == sorted(
        folder.name for folder in (ROOT / "packages").iterdir() if (folder / "pyproject.toml").exists()
    )

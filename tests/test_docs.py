"""What README and the other pages say is true: the code runs, commands exist, links lead somewhere.

sybil finds the fenced blocks of a page. `python` blocks run in order, in one namespace that begins as the first block
of docs/index.md leaves it; `console` blocks run their `python -m peft_core` lines; `toml` and `json` are parsed.
"""

from __future__ import annotations

import builtins
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from peft_core import AdapterConfig, SiteRequest, TargetedConfig, methods
from peft_core.__main__ import main
from peft_core.extensions import extensions
from peft_core.testing import MethodContract, Setup
from peft_core.testing.command import check_contract, run

ROOT = Path(__file__).resolve().parent.parent
PREAMBLE = "docs/index.md"
TUTORIAL = "docs/tutorial.md"


def pages(*patterns: str) -> list[str]:
    return sorted(page.relative_to(ROOT).as_posix() for pattern in patterns for page in ROOT.glob(pattern))


ALL = pages("*.md", "docs/**/*.md", "packages/*/*.md", "examples/*/*.md")
RUN = pages("README.md", "docs/**/*.md")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(example: Example) -> None:
    """Run the commands that are cheap, in this process, and want them to succeed."""
    for line in re.findall(r"^\$ python -m peft_core ([^#\n]*)", example.parsed, re.MULTILINE):
        if "--contract" not in line:  # minutes rather than seconds, and the suite's own matter
            assert main(shlex.split(line)) == 0, line


def blocks(page: str) -> Document:
    checks: dict[str, Callable[[Example], Any]] = {
        "toml": lambda example: tomllib.loads(example.parsed) and None,
        "json": lambda example: json.loads(example.parsed) and None,
        "console": commands,
    }
    parsers = [CodeBlockParser(language, check) for language, check in checks.items()]
    return Document.parse(str(ROOT / page), PythonCodeBlockParser(), SkipParser(), *parsers)


def begin(page: str, namespace: dict[str, Any]) -> None:
    """Run what a page takes for granted: the index's names, and on pages about plugins the tutorial's first one."""
    about_plugins = page.startswith("docs/hooks/") or page == "docs/plugins.md"
    for start in (PREAMBLE, TUTORIAL) if about_plugins else (PREAMBLE,):
        if page not in ("README.md", start):
            first = next(e for e in blocks(start).examples() if e.region.lexemes["arguments"] == "python")
            first.namespace = namespace
            PythonEvaluator()(first)


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    before, others = set(methods._registered), set(extensions.names())
    yield
    for name in set(methods._registered) - before:
        methods.unregister_method(name)
    for name in set(extensions.names()) - others:
        if extensions._entries[name] is None:
            extensions.unregister(name)


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = blocks(page)
    document.namespace["__name__"] = "page"
    begin(page, document.namespace)
    for example in document.examples():
        example.evaluate()
    if page == "README.md":
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in Path("adapter").iterdir()}
        assert type(document.namespace["merged"]) is type(document.namespace["base"]())
    if page == TUTORIAL:  # it shows what the command has written
        written = tomllib.loads((tmp_path / "acme-outer" / "pyproject.toml").read_text())["project"]
        told = next(tomllib.loads(e.parsed)["project"] for e in document.examples() if "[project]" in e.parsed)
        assert {key: written[key] for key in told} == told


# The others need arguments, places that the suite's models do not have, or other adapters.
CONTRACTS = "activations additive banks calibration combination losses norms-and-biases rank-change rows sequential"


@pytest.mark.slow
@pytest.mark.parametrize("page", [*CONTRACTS.split(), "prompts", "training", "weight-space"])
def test_the_method_of_a_page_keeps_the_contract(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_{page}")  # what can be found by its name can be pickled and compiled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    page = f"docs/how-to/{page}.md"
    before, document = set(methods._registered), blocks(page)
    document.namespace = module.__dict__
    begin(page, module.__dict__)
    for example in document.examples():
        example.evaluate()
    module.__dict__["__builtins__"] = builtins
    written = {value for value in module.__dict__.values() if isinstance(value, type)} - {MethodContract}
    written = {value for value in written if issubclass(value, MethodContract)}
    for value in written:
        assert run({value.__name__: value}), capsys.readouterr().out
    found = set(methods._registered) - before - {type(value.config).peft_type.lower() for value in written}
    assert found or written
    for name in found:
        assert check_contract(name), capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in RUN if page not in ("README.md", "docs/benchmarks.md")])
def test_blocks_say_what_they_are(page: str) -> None:
    fences = re.findall(r"^```(.*)$", read(page), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "console", "toml", "json", "text"} and set(fences[1::2]) <= {""}


def test_a_block_that_fails_fails_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\n\n```toml\nb = 1\n```\n\n```python\nassert a == 2\n```\n")
    first, second, third = blocks(str(page)).examples()
    first.evaluate()
    second.evaluate()
    with pytest.raises(AssertionError):
        third.evaluate()


@pytest.mark.parametrize("page", ALL)
def test_commands_are_scripts_of_the_workspace(page: str) -> None:
    scripts = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["envs"]["default"]["scripts"]
    assert set(re.findall(r"hatch run (\w+)", read(page))) <= set(scripts)


@pytest.mark.parametrize("page", ALL)
def test_links_lead_to_files(page: str) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_index_leads_to_every_page() -> None:
    linked = {((ROOT / "docs") / link).resolve() for link in re.findall(r"\]\(([\w/.-]+\.md)", read(PREAMBLE))}
    linked |= {((ROOT / "docs") / link).resolve() for link in re.findall(r"\]\(([\w/.-]+\.md)", read("docs/hooks.md"))}
    assert {ROOT / page for page in pages("docs/**/*.md")} - linked == {ROOT / PREAMBLE}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/contract.md", {name for name in dir(MethodContract) if name.startswith("test_")}),
        ("docs/contract.md", set(Setup.__annotations__) | {"configure", "call_arguments", "randomize"}),
        ("docs/configs.md", {*TargetedConfig.model_fields, *TargetedConfig.__annotations__}),
        ("docs/configs.md", {*AdapterConfig.__annotations__, "refers_to", "trains_referred", "translate"}),
        ("docs/configs.md", {field.name for field in fields(SiteRequest)}),
    ],
)
def test_references_are_complete(page: str, names: set[str]) -> None:
    told = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", read(page)))
    assert names - told == {"model_config"} & names  # pydantic's own


def test_help_explains_every_setting() -> None:
    told = inspect.getdoc(Setup) or ""
    assert {name for name in Setup.__annotations__ if f"    {name}: " not in told} == set()


def test_the_table_of_packages_is_complete() -> None:
    assert sorted(re.findall(r"^\| \[(peft-\w+)\]", read("README.md"), re.MULTILINE)) == sorted(
        folder.name for folder in (ROOT / "packages").iterdir() if (folder / "pyproject.toml").exists()
    )

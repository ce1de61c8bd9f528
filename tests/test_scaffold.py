"""`python -m peft_core new`: what it writes is installed, tested, linted and typed as it is, from the core's wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
from packaging.specifiers import SpecifierSet

from peft_core import scaffold
from peft_core.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
# The longest name there can be, and the longest class names: lines of the templates must hold them.
LONG = "amethodofthirtylettersandnotone"[:30]


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    text: str = done.stdout
    return text


def build_and_install(project: Path, wheels: Path, target: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels, cwd=project)
    # uv rather than pip: environments made by uv have no pip.
    run(
        sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps", "--no-index",
        "--python", sys.executable, "--target", target, *wheels.glob("*.whl"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the core's wheel and nothing else of this repository."""
    target = tmp_path_factory.mktemp("core")
    build_and_install(ROOT / "packages" / "peft-core", tmp_path_factory.mktemp("wheels"), target)
    return target


@pytest.fixture(scope="module")
def make(core: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a package by the command of the installed core, and return its folder."""

    def new(name: str, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("new")
        env = {**os.environ, "PYTHONPATH": str(core)}
        said = run(sys.executable, "-m", "peft_core", "new", name, *options, cwd=folder, env=env)
        assert said.splitlines()[-1] == f"Now: cd {name} && python -m pip install -e '.[test]' && python -m pytest"
        return folder / name

    return new


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_a_package_passes_its_own_tests(
    kind: str, core: Path, make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = make(f"acme-{kind}", "--kind", kind)
    target = tmp_path_factory.mktemp("site-packages")
    build_and_install(project, tmp_path_factory.mktemp("wheels"), target)
    assert (target / f"acme_{kind}" / "py.typed").is_file()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(core)])}
    where = f"import acme_{kind}, peft_core; print(acme_{kind}.__file__); print(peft_core.__file__)"
    installed = [Path(file) for file in run(sys.executable, "-c", where, cwd=target, env=env).split()]
    assert [file.parents[1] for file in installed] == [target, core]
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project, env=env)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) > 100, said
    assert "skipped" not in said, said
    said = run(sys.executable, "-m", "peft_core", "check", "--contract", f"acme_{kind}", "-k", "start or key", env=env)
    assert f"method 'acme_{kind}' (acme-{kind} 0.1.0, acme_{kind}.method)" in said


@pytest.fixture(scope="module")
def types_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The types of torch are read once."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("name", ["ab", LONG])
@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_a_package_is_clean(kind: str, name: str, tmp_path: Path, types_cache: Path) -> None:
    """By the rules that it brings along, formatted, and with types."""
    project = scaffold.create(name, kind, directory=tmp_path)
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=project)
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".", cwd=project)
    if name != LONG:
        env = {**os.environ, "MYPYPATH": str(ROOT / "packages" / "peft-core" / "src")}
        run(sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", types_cache, cwd=project, env=env)


def test_files_and_metadata(tmp_path: Path) -> None:
    project = scaffold.create("Acme_Turn", "weight", method="turning", directory=tmp_path / "new")
    assert project == tmp_path / "new" / "acme-turn"
    files = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert files == {
        ".github/workflows/ci.yml", ".gitignore", "LICENSE", "README.md", "pyproject.toml",
        "src/acme_turn/__init__.py", "src/acme_turn/method.py", "src/acme_turn/py.typed", "tests/test_acme_turn.py",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["acme-turn"]
    table = tomllib.loads((project / "pyproject.toml").read_text())
    assert table["project"]["name"] == "acme-turn"
    assert table["project"]["entry-points"] == {"peft_core.methods": {"turning": "acme_turn.method"}}
    assert scaffold.requirement(metadata.version("peft-core")) in table["project"]["dependencies"]
    assert table["tool"]["pytest"]["ini_options"]["filterwarnings"] == ["error"]
    assert 'peft_type: ClassVar[str] = "TURNING"' in (project / "src/acme_turn/method.py").read_text()
    assert "python-version: ${{ matrix.python }}" in (project / ".github/workflows/ci.yml").read_text()
    for path in files:
        assert not re.search(r"\$[a-z]|\$\{[a-z]", (project / path).read_text()), f"{path}: a placeholder is left"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.1.0", "peft-core>=0.1,<0.2"),
        ("0.9.3", "peft-core>=0.9,<0.10"),
        ("1.4.2", "peft-core>=1.4,<2"),
        ("2.0.0rc1", "peft-core>=2.0.0rc1,<3"),
        ("0.2.0.dev3", "peft-core>=0.2.0.dev3,<0.3"),
        (None, "peft-core"),
    ],
)
def test_the_range_of_the_core(version: str | None, expected: str) -> None:
    assert scaffold.requirement(version) == expected
    if version is not None:
        allowed = SpecifierSet(expected.removeprefix("peft-core"))
        assert allowed.contains(version, prereleases=True)
        assert not allowed.contains("0.0.9")
        assert not allowed.contains("3")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["9lives"], "'9lives' is no name for a package: it becomes '9lives'"),
        (["acme method"], "'acme method' is no name"),
        (["../acme"], "is no name"),
        (["acme--"], "'acme--' is no name"),
        (["méthode"], "'méthode' is no name"),
        (["class"], "'class' is no name"),
        ([""], "'' is no name"),
        ([LONG + "s"], "is longer than 30 characters"),
        (["lora"], r"A method 'lora' is installed already \(peft-lora "),
        (["acme-turn", "--method", "LoRA"], r"A method 'lora' is installed already"),
        (["acme-turn", "--method", "a b"], "'a b' is no name"),
        (["peft-core"], "A module 'peft_core' can be imported already"),
        (["json"], "A module 'json' can be imported already"),
        (["taken"], "taken exists already, and is not overwritten"),
    ],
)
def test_names_that_are_refused(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "file").write_text("mine")
    assert main(["new", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(rf"ScaffoldError: .*{words}", said.err), said.err
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*")) == ["taken", "taken/file"]


def test_methods_known_elsewhere_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of packages that are not installed, too: their files would be taken for the new method's."""
    monkeypatch.setattr(scaffold, "entries", lambda group: ())
    with pytest.raises(scaffold.ScaffoldError, match="'lora' is the method of peft-lora"):
        scaffold.create("acme-turn", method="lora")
    assert not list(here.iterdir())


def test_a_failure_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("shutil.move", fail)
    with pytest.raises(OSError, match="disk full"):
        scaffold.create("acme-turn")
    assert not list(here.iterdir())

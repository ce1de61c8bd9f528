"""`python -m peft_core check --contract`: what it finds out about a method, and what it says of a wrong one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_toys import PLUGINS, ToyConfig

import peft_core
from peft_core import register_method, unregister_method
from peft_core.__main__ import main
from peft_core.testing import MethodContract
from peft_core.testing.command import run as run_classes
from peft_core.testing.probe import Findings, probe

HERE = Path(__file__).parent
SOURCE = Path(peft_core.__file__).parents[1]


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield register_method(getattr(PLUGINS, request.param), replace=True)
    unregister_method("toy")


# -- probing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toy", "kinds", "merges", "rowwise", "starts"),
    [
        ("LowRank", ["linear"], True, True, True),
        ("Doubling", ["linear"], True, True, False),
        ("Centred", ["linear"], False, False, True),
        ("NormGain", ["norm"], True, True, True),
        ("OnBlocks", ["block"], False, True, True),
        ("whole", ["model"], False, False, True),
        # Accepts every layer, and runs on none: not what it adapts, so that the suite says what is wrong.
        ("TakesAnyLayer", [], False, None, None),
        # Calls need task_ids: what can be built counts.
        ("per_task", ["linear"], False, True, True),
    ],
    indirect=["toy"],
)
def test_what_a_method_does_is_found_by_trial(
    toy: Any, kinds: list[str], merges: bool, rowwise: bool | None, starts: bool | None
) -> None:
    found = probe(toy())
    assert found.kinds == kinds
    assert bool(found.merged) is merges
    assert (found.rowwise, found.starts_as_base) == (rowwise, starts)
    assert (found.refused, found.left_out) == ([], [])


@pytest.mark.parametrize("toy", ["Biased"], indirect=True)
def test_what_is_refused_of_an_adapted_kind_is_found(toy: Any) -> None:
    found = probe(toy())
    assert found.attributes == {
        "config": ToyConfig(),
        "layer_kinds": ("linear",),
        "refused_cases": ("linear-no-bias",),
        "left_out": ("blocks.0.down", "blocks.1.down"),
        "mergeable": True,
        "unmergeable_cases": ("linear-four-axes",),  # the one with fewer features behind it than before
    }


def test_the_table() -> None:
    found = Findings(ToyConfig(), kinds=["linear"], refused=["linear-no-bias"], merged=["linear"], rowwise=False)
    assert str(found).splitlines() == [
        "  adapts:                    linear",
        "  refuses:                   attention, block, conv1d, conv2d, conv3d, embedding, norm",
        "  refuses of what it adapts: linear-no-bias",
        "  merges:                    yes",
        "  starts as base:            not known",
        "  one adapter per row:       no",
    ]


# -- the command, in this process --------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["LowRank"], indirect=True)
def test_a_right_method_passes(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # nothing is left behind that a second run would see
        assert main(["check", "--contract", "TOY", "-k", "start_equals or start_leaves or pickle"]) == 0
        said = capsys.readouterr().out
        assert "  adapts:                    linear\n" in said
        assert re.search(r"^3 checks passed, 0 failed, in \d", said, re.MULTILINE)


@pytest.mark.parametrize("toy", ["StartsSomewhere"], indirect=True)
def test_a_wrong_method_fails(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--contract", "toy", "-k", "start_equals or test_layer"]) == 1
    said = capsys.readouterr().out
    assert "FAILED TestToy.test_start_equals_base\n  promise: an adapter at its start leaves" in said
    assert "\n  seen:    outputs differ by" in said
    assert "\n  look at: Adapter.reset_parameters (start values); or set `starts_as_base = False`" in said
    assert re.search(r"FAILED TestToy.test_layer \[linear, linear-no-bias, [^]]*\]\n  promise: linear: an", said)
    assert "Traceback" not in said


@pytest.mark.parametrize("toy", ["ReturnsNothing"], indirect=True)
def test_one_fault_is_told_once(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every test that calls the model fails, on what the base makes of None: one message."""
    # `probe` cannot run it either; told what it adapts, the suite goes on.
    suite = type("TestToy", (MethodContract,), {"config": toy()})
    select = "start_equals or disabled or deepcopy or pickle or state_keys"
    assert not run_classes({"TestToy": suite}, select)
    said = capsys.readouterr().out
    assert said.count("\nFAILED ") == 1, said
    assert re.search(
        r"FAILED TestToy.test_\w+\n  and 3 more with what is seen here:\n(    test_\w+\n){3}  promise: ", said
    )
    assert "1 checks passed, 4 failed" in said


@pytest.mark.parametrize("toy", ["MergesWrongly"], indirect=True)
def test_different_faults_are_told_apart(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    suite = type("TestToy", (MethodContract,), {"config": toy()})
    assert not run_classes({"TestToy": suite}, "merge_and_unmerge or merge_and_unload")
    assert capsys.readouterr().out.count("\nFAILED ") == 2


@pytest.mark.parametrize("toy", ["BranchesOnValues"], indirect=True)
def test_the_log_of_the_compiler_is_not_shown(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    suite = type("TestToy", (MethodContract,), {"config": toy()})
    assert not run_classes({"TestToy": suite}, "test_compile", tracebacks=True)
    said = capsys.readouterr().out
    assert "compiles into one graph" in said and "torch.__trace" not in said


@pytest.mark.parametrize("toy", ["LowRank"], indirect=True)
def test_a_selection_of_nothing_is_no_success(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--contract", "toy", "-k", "no_such_check"]) == 1
    assert "0 checks passed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"r": 4', "ConfigError: --config is not JSON"),
        ("[1]", "ConfigError: --config is a JSON object of the config's fields, not list"),
        ('{"rank": 4}', r"ToyConfig has no such field[\s\S]*give the fields with --config"),
        (
            '{"exclude_modules": ["layer", "up", "down"]}',
            "adapts none of the suite's layers with this config:\nlinear, ",
        ),
    ],
)
@pytest.mark.parametrize("toy", ["LowRank"], indirect=True)
def test_configs_that_do_not_work(toy: Any, config: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--contract", "toy", "--config", config]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_unknown_methods_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--contract", "no_such_method"]) == 1
    assert "MethodNotFoundError: No method 'no_such_method' is installed" in capsys.readouterr().err


# -- the command, on installed methods ---------------------------------------------------------------------------

METHOD = """
{imports}
from typing import ClassVar
from contract_toys import LowRank, ToyConfig
from peft_core import hookimpl

class Config(ToyConfig):
    peft_type: ClassVar[str] = "{name}"

@hookimpl
def peft_config():
    return Config

@hookimpl
def peft_build(config, layer):
    return LowRank(layer, config)
"""

CONTRACT = """
from acme_own import Config
from peft_core.testing import MethodContract

class Base(MethodContract):
    config = Config(r=2)

class TestOwn(Base):
    def test_rank(self):
        assert self.config.r == 3
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which three methods are installed."""
    folder = tmp_path_factory.mktemp("site-packages")
    imports = {"acme_heavy": "import pandas", "acme_own": "", "acme_friend": "import acme_own"}
    for name, line in imports.items():
        (folder / f"{name}.py").write_text(METHOD.format(imports=line, name=name.upper()))
    (folder / "acme_own_contract.py").write_text(CONTRACT)
    (folder / "acme_friend_contract.py").write_text("import nothing_of_that_name\n")
    (folder / "pandas.py").write_text("")
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    points = "".join(f"{name} = {name}\n" for name in imports)
    (info / "entry_points.txt").write_text(f"[peft_core.methods]\n{points}")
    return folder


def run(site: Path, code: str, *arguments: str) -> tuple[int, str, str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, HERE, SOURCE)))}
    start = f"import sys\n{textwrap.dedent(code)}\nfrom peft_core.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments], env=env, cwd=site, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_imports_are_checked(site: Path) -> None:
    code, said, _ = run(site, "", "check", "--contract", "acme_heavy", "-k", "isolation")
    assert code == 1
    assert "promise: loading a method imports nothing heavy\n  seen:    imported: ['pandas']" in said
    assert "look at: the imports of acme_heavy" in said


def test_settings_of_the_package_are_used(site: Path) -> None:
    own = ("check", "--contract", "acme_own", "-k", "rank or pickle")
    code, said, _ = run(site, "", *own)
    assert code == 1
    assert said.startswith("method 'acme_own' (acme 1.0, acme_own): as TestOwn of its package say\n")
    assert re.search(r"FAILED TestOwn.test_rank\n  .*acme_own_contract.py:10: AssertionError\n", said)
    code, said, _ = run(site, "", *own, "--config", '{"r": 3}')
    assert code == 0, said
    assert "2 checks passed" in said


def test_settings_that_cannot_be_imported_are_an_error(site: Path) -> None:
    code, _, said = run(site, "", "check", "--contract", "acme_friend")
    assert code == 1
    assert "MethodContractError: The method 'acme_friend' (acme 1.0, acme_friend) has settings" in said
    assert "acme_friend_contract, which cannot be imported: ModuleNotFoundError" in said


def test_pytest_is_asked_for(site: Path) -> None:
    code, said, wrong = run(site, "sys.modules['pytest'] = None", "check", "--contract", "acme_own")
    assert (code, said) == (1, "")
    assert wrong.strip().endswith("pip install 'peft-core[testing]'")
    code, said, _ = run(site, "sys.modules['pytest'] = None", "check", "acme_own")
    assert (code, said) == (0, "method acme_own: ok\n")

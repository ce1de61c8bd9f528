"""Finding and loading plugins. Throw-away distributions in a folder, looked at from sub-processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import peft_core
from peft_core import discovery, errors
from peft_core.__main__ import main
from tools import known_methods

SOURCE = Path(peft_core.__file__).parents[1]

METHOD = """
from typing import ClassVar
import peft_core

class Config(peft_core.AdapterConfig):
    peft_type: ClassVar[str] = "{type}"
    r: int = 8

@peft_core.hookimpl
def peft_config():
    return Config

@peft_core.hookimpl
def peft_build(layer):
    raise NotImplementedError
"""


def method(name: str, extra: str = "") -> str:
    return METHOD.format(type=name.upper()) + textwrap.dedent(extra)


def install(
    site: Path,
    distribution: str,
    modules: Mapping[str, str],
    *,
    methods: Mapping[str, str] | None = None,
    extensions: Mapping[str, str] | None = None,
    version: str = "1.0",
    requires: Sequence[str] = (),
) -> None:
    """What an installer leaves behind: a `.dist-info` folder and the modules."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    groups = {"peft_core.methods": methods or {}, "peft_core.extensions": extensions or {}}
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in groups.items()
            if points
        )
    )
    files = {}
    for name, source in modules.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        files[name] = ",,"
    (info / "RECORD").write_text("".join(f"{name}{rest}\n" for name, rest in files.items()))


@pytest.fixture(scope="module")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A maker of empty folders in which peft-core has version 0.1.5, whatever is installed."""

    def make() -> Path:
        site = tmp_path_factory.mktemp("site")
        install(site, "peft-core", {}, version="0.1.5")
        return site

    return make


def run(site: Path, *arguments: str, check: bool = True, **environment: Any) -> subprocess.CompletedProcess[str]:
    # No bytecode: a module fixed within a second of its first import must be read again.
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(SOURCE)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=site.parent, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def ask(site: Path, script: str, **environment: str) -> Any:
    """Run a script that ends with `answer(value)` and return the value."""
    preamble = "import json, sys\nimport peft_core\ndef answer(value): print(json.dumps(value))\n"
    done = run(site, "-W", "error", "-c", preamble + textwrap.dedent(script), **environment)
    return json.loads(done.stdout.splitlines()[-1])


# -- every way in which a plugin can be wrong ---------------------------------------------------------------

# Case: (error class, words that name the culprit, words of the remedy).
BROKEN: dict[str, tuple[type[errors.MethodError], list[str], list[str]]] = {
    "acme_gone": (errors.MethodNotFoundError, ["'acme_gone'", "Installed:"], ["register_method"]),
    "acme_ome": (errors.MethodNotFoundError, ["'acme_ome'"], ["Did you mean 'acme_one'?"]),
    "acme_twin": (
        errors.MethodClashError,
        ["'acme_twin'", "acme-twin-a 1.0 (acme_twin_a)", "acme-twin-b 2.0 (acme_twin_b)"],
        ["Uninstall one", "PEFT_CORE_DISABLE_PLUGINS=acme-twin-b"],
    ),
    "acme_import": (
        errors.MethodImportError,
        ["'acme_import'", "acme-import 1.0", "ZeroDivisionError", "acme_import.py, line 3"],
        ["reinstall acme-import"],
    ),
    "acme_exit": (errors.MethodImportError, ["acme-exit 1.0", "SystemExit"], ["reinstall acme-exit"]),
    "acme_nomodule": (
        errors.MethodImportError,
        ["acme-nomodule 1.0", "No module named 'acme_absent'"],
        ["reinstall acme-nomodule"],
    ),
    "acme_nopath": (
        errors.MethodImportError,
        ["acme-nopath 1.0", "not of the form"],
        ["packaging of acme-nopath"],
    ),
    "acme_hook": (
        errors.MethodContractError,
        ["'acme_hook'", "acme-hook 1.0", "'peft_prepair'"],
        ["Did you mean 'peft_prepare'?"],
    ),
    "acme_argument": (
        errors.MethodContractError,
        ["acme-argument 1.0", "peft_merge has no argument 'adaptor'", "peft_state_key has no argument 'zzz'"],
        ["Did you mean 'adapter'?", "config, adapter, params"],
    ),
    "acme_default": (
        errors.MethodContractError,
        ["acme-default 1.0", "'tensors' a default", "'**rest', which is never passed"],
        ["remove it"],
    ),
    "acme_marker": (
        errors.MethodContractError,
        ["acme-marker 1.0", "peft_match lacks"],
        ["@peft_core.hookimpl"],
    ),
    "acme_elsewhere": (
        errors.MethodContractError,
        ["acme-elsewhere 1.0", "peft_layer cannot be implemented here"],
        ["peft_core.extensions"],
    ),
    "acme_42": (
        errors.MethodContractError,
        ["acme-42 1.0", "returned 42 (int) from peft_config"],
        ["subclass of peft_core.AdapterConfig"],
    ),
    "acme_raises": (
        errors.MethodContractError,
        ["acme-raises 1.0", "KeyError in peft_config"],
        ["config class"],
    ),
    "acme_noconfig": (
        errors.MethodContractError,
        ["acme-noconfig 1.0", "does not implement peft_config"],
        ["define a function"],
    ),
    "acme_name": (
        errors.MethodContractError,
        ["acme-name 1.0", "peft_type is 'ACME_OTHER'"],
        ["It must be 'ACME_NAME'", "Correct"],
    ),
    "acme_version": (
        errors.MethodVersionError,
        ["acme-version 1.0", "peft-core<0.1", "peft-core 0.1.5 is installed"],
        ["pip install -U peft-core acme-version"],
    ),
    "acme_range": (
        errors.MethodVersionError,
        ["acme-range 1.0", "peft-core >=> 1"],
        ["packaging of acme-range"],
    ),
    "acme_off": (
        errors.MethodDisabledError,
        ["'acme_off'", "acme-off 1.0", "PEFT_CORE_DISABLE_PLUGINS"],
        ["Take it off that list"],
    ),
    "acme_off_too": (errors.MethodDisabledError, ["'acme_off_too'", "acme-off-too 1.0"], ["Take it off"]),
}
DISABLED = {"PEFT_CORE_DISABLE_PLUGINS": "acme_off, Acme-Off-Too,acme_unheard_of"}


@pytest.fixture(scope="module")
def broken_site(make_site: Callable[[], Path]) -> Path:
    site = make_site()
    boom = "raise RuntimeError('imported')\n"
    no_build = method("acme_noconfig").partition("@peft_core")[0]
    install(
        site,
        "acme-good",
        {
            "acme_good/__init__.py": "",
            "acme_good/one.py": method("acme_one"),
            "acme_good/two.py": boom,
        },
        methods={"Acme_One": "acme_good.one", "acme_two": "acme_good.two"},
        requires=[
            "peft-core>=0.1,<0.2",
            "peft-core<0.1; extra == 'old'",
            "peft-core<0.1; python_version < '3'",
        ],
    )
    install(site, "acme-twin-a", {"acme_twin_a.py": boom}, methods={"acme_twin": "acme_twin_a"})
    install(site, "acme-twin-b", {"acme_twin_b.py": boom}, methods={"acme_twin": "acme_twin_b"}, version="2.0")
    one_by_one: dict[str, tuple[str, list[str]]] = {
        "acme_import": ("import os\n\n1 / 0\n", []),
        "acme_exit": ("raise SystemExit(3)\n", []),
        "acme_hook": (method("acme_hook", "@peft_core.hookimpl\ndef peft_prepair(): ...\n"), []),
        "acme_argument": (
            method(
                "acme_argument",
                """
                @peft_core.hookimpl
                def peft_merge(adaptor, params): ...
                @peft_core.hookimpl
                def peft_state_key(key, zzz): ...
                """,
            ),
            [],
        ),
        "acme_default": (
            method(
                "acme_default",
                """
                @peft_core.hookimpl
                def peft_build(layer, tensors=None, **rest): ...
                """,
            ),
            [],
        ),
        "acme_marker": (method("acme_marker", "def peft_match(config, path): ...\n"), []),
        "acme_elsewhere": (
            method("acme_elsewhere", "@peft_core.hookimpl\ndef peft_layer(path, module): ...\n"),
            [],
        ),
        "acme_42": (method("acme_42", "@peft_core.hookimpl\ndef peft_config(): return 42\n"), []),
        "acme_raises": (
            method("acme_raises", "@peft_core.hookimpl\ndef peft_config(): return {}['r']\n"),
            [],
        ),
        "acme_noconfig": (no_build + "@peft_core.hookimpl\ndef peft_build(layer): ...\n", []),
        "acme_name": (method("acme_other"), []),
        "acme_version": (boom, ["peft_core < 0.1"]),
        "acme_range": (boom, ["peft-core >=> 1"]),
        "acme_off": (boom, []),
        "acme_off_too": (boom, []),
    }
    for name, (source, requires) in one_by_one.items():
        distribution = name.replace("_", "-")
        install(site, distribution, {f"{name}.py": source}, methods={name: name}, requires=requires)
    install(site, "acme-nomodule", {}, methods={"acme_nomodule": "acme_absent"})
    install(site, "acme-nopath", {}, methods={"acme_nopath": "acme/absent.py"})
    return site


@pytest.fixture(scope="module")
def broken(broken_site: Path) -> dict[str, Any]:
    """For each broken plugin: its error's class and message, and whether a good one loads afterwards."""
    script = f"""
        found = {{}}
        for name in {list(BROKEN)!r}:
            before = set(sys.modules)
            try:
                peft_core.load_method(name)
            except peft_core.MethodError as error:
                new = {{m for m in set(sys.modules) - before if m.startswith("acme")}}
                again = peft_core.load_method("acme_one")(r=3).r == 3
                found[name] = [type(error).__name__, str(error), again, sorted(new)]
        listed = {{n: i.problem for n, i in peft_core.available_methods().items()}}
        answer({{"errors": found, "listed": listed}})
    """
    result: dict[str, Any] = ask(broken_site, script, **DISABLED)
    return result


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_harms_no_other(broken: dict[str, Any], name: str) -> None:
    kind, culprit, remedy = BROKEN[name]
    found, message, again, left = broken["errors"][name]
    assert found == kind.__name__, message
    for words in culprit + remedy:
        assert words in message
    assert again, "a good plugin did not load afterwards"
    assert left == []


def test_the_list_tells_what_metadata_tells(broken: dict[str, Any]) -> None:
    listed = broken["listed"]
    told = ("MethodClashError", "MethodVersionError", "MethodDisabledError")
    for name, (kind, message, _, _) in broken["errors"].items():
        if kind in told or name == "acme_nopath":
            assert listed[name] == message
        elif name in listed:
            assert listed[name] is None
    assert listed["acme_one"] is None


def test_command_line_check(broken_site: Path) -> None:
    done = run(broken_site, "-m", "peft_core", "check", check=False, **DISABLED)
    assert done.returncode == 1
    assert "method acme_one: ok" in done.stdout
    assert "method acme_42: MethodContractError\n    The method 'acme_42' (acme-42 1.0" in done.stdout
    assert done.stderr == ""
    assert run(broken_site, "-m", "peft_core", "check", "acme_one").stdout == "method acme_one: ok\n"


def test_command_line_table(broken_site: Path) -> None:
    lines = run(broken_site, "-m", "peft_core", "methods", **DISABLED).stdout.splitlines()
    assert lines[0].split() == ["method", "distribution", "version", "status"]
    assert ["acme_one", "acme-good", "1.0", "ok"] in [line.split() for line in lines]
    assert "needs peft-core<0.1, and" in next(line for line in lines if line.startswith("acme_version "))
    assert lines[-1] == "PEFT_CORE_DISABLE_PLUGINS names nothing installed: acme_unheard_of"


def test_command_line_without_plugins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(discovery, "entries", lambda group: ())
    monkeypatch.delenv("PEFT_CORE_DISABLE_PLUGINS", raising=False)
    assert main(["methods"]) == 0
    assert capsys.readouterr().out == "No methods are installed.\n"
    assert main(["check"]) == 0
    assert main([]) == 0
    assert "methods" in capsys.readouterr().out


# -- what is imported, and when -----------------------------------------------------------------------------


def test_only_the_method_asked_for_is_imported(broken_site: Path) -> None:
    def plugins(modules: str) -> str:
        return f"sorted(m for m in {modules} if m.startswith('acme'))"

    result = ask(
        broken_site,
        f"""
        bare = [m for m in ("torch", "pluggy", "pydantic") if m in sys.modules]
        methods = peft_core.available_methods()
        info = methods["acme_one"]
        listed = {plugins("sys.modules")}, "torch" in sys.modules
        method = peft_core.load_method("ACME_ONE")
        import copy, pickle
        same = [peft_core.load_method("acme_one"), copy.copy(method), copy.deepcopy([method])[0],
                pickle.loads(pickle.dumps(method))]
        answer([bare, listed, {plugins("sys.modules")}, "torch" in sys.modules,
                [info.name, info.distribution, info.version, info.module, info.problem],
                [method.name, str(method.source), method.config_class.__name__],
                all(m is method for m in same)])
        """,
    )
    bare, listed, loaded, torch, info, described, same = result
    assert bare == []
    assert listed == [[], False]
    assert loaded == ["acme_good", "acme_good.one"]
    assert not torch, "looking a method up needs no torch unless its module does"
    assert info == ["acme_one", "acme-good", "1.0", "acme_good.one", None]
    assert described == ["acme_one", "acme-good 1.0", "Config"]
    assert same


def test_disabling_one_of_two_providers_settles_a_clash(broken_site: Path) -> None:
    (broken_site / "acme_twin_a.py").write_text(method("acme_twin"))
    script = "answer(str(peft_core.load_method('acme_twin').source))"
    assert ask(broken_site, script, PEFT_CORE_DISABLE_PLUGINS="ACME_twin.B") == "acme-twin-a 1.0"


def test_the_allow_list_decides_before_any_import(broken_site: Path) -> None:
    result = ask(
        broken_site,
        """
        found = []
        for allow in ((), {"acme_import"}, "acme_import"):
            try:
                peft_core.load_method("acme_one", allow=allow)
            except peft_core.MethodDisabledError as error:
                found.append(str(error))
        before = [m for m in sys.modules if m.startswith("acme")]
        answer([found, before, peft_core.load_method("acme_one", allow=["Acme_One"]).name])
        """,
    )
    found, before, name = result
    assert len(found) == 3
    assert all("'acme_one' is not on the allow list" in message for message in found)
    assert "acme_import" in found[1]
    assert "Add it to `allow`" in found[1]
    assert before == []
    assert name == "acme_one"


def test_installing_and_repairing_while_python_runs(make_site: Callable[[], Path]) -> None:
    site = make_site()
    install(
        site,
        "acme-late",
        {
            "acme_late/__init__.py": "",
            "acme_late/parts.py": "VALUE = 1\n",
            "acme_late/late.py": "from . import parts\n" + method("acme_late", "peft_build = 1 / 0\n"),
        },
        methods={"acme_late": "acme_late.late"},
    )
    # The last folder of the path comes into being later, as if by an installer.
    result = ask(
        site,
        f"""
        import pathlib
        steps = []
        site = pathlib.Path({str(site)!r})
        module = site / "acme_late/late.py"
        def attempt(name="acme_late"):
            try:
                peft_core.load_method(name)
                steps.append("ok")
            except peft_core.MethodError as error:
                steps.append(type(error).__name__)
            steps.append(sorted(m for m in sys.modules if m.startswith("acme")))
        attempt()                                                   # raises on import
        good = module.read_text().replace("peft_build = 1 / 0", "")
        module.write_text(good.replace("def peft_build(layer)", "def peft_build(lair)"))
        attempt()                                                   # imports, but breaks the contract
        module.write_text(good)
        attempt()                                                   # repaired
        info = site / "acme_new-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: acme-new\\nVersion: 1.0\\n")
        (info / "entry_points.txt").write_text("[peft_core.methods]\\nacme_new = acme_new\\n")
        (site / "acme_new.py").write_text(good.replace("from . import parts", "").replace("LATE", "NEW"))
        steps.append("acme_new" in peft_core.available_methods())   # cached
        peft_core.refresh()
        steps.append("acme_new" in peft_core.available_methods())
        attempt("acme_new")
        answer(steps)
        """,
    )
    late = ["acme_late", "acme_late.late", "acme_late.parts"]
    assert result[:6] == ["MethodImportError", [], "MethodContractError", [], "ok", late]
    assert result[6:] == [False, True, "ok", [*late, "acme_new"]]


def test_unreadable_metadata_is_reported_and_hides_nobody(make_site: Callable[[], Path]) -> None:
    site = make_site()
    install(site, "acme-fine", {"acme_fine.py": method("acme_fine")}, methods={"acme_fine": "acme_fine"})
    install(site, "acme-garbled", {}, methods={"acme_garbled": "acme_garbled"})
    (site / "acme_garbled-1.0.dist-info/entry_points.txt").write_text("[peft_core.methods]\nno equals sign\n")
    install(site, "acme-nameless", {}, methods={"acme_nameless": "x"})
    (site / "acme_nameless-1.0.dist-info/METADATA").write_text("Version: 1.0\n")
    names, messages = ask(
        site,
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = [name for name in peft_core.available_methods() if name.startswith("acme")]
        messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
        answer([names, messages])
        """,
    )
    assert names == ["acme_fine"]
    assert len(messages) == 2
    assert any("acme-garbled cannot be read" in message for message in messages)
    assert any("acme_nameless-1.0.dist-info cannot be read" in message for message in messages)


def test_of_two_copies_on_the_path_the_first_counts(make_site: Callable[[], Path]) -> None:
    site, shadowed = make_site(), make_site()
    new = {"acme_copy.py": method("acme_copy")}
    install(site, "acme-copy", new, methods={"acme_copy": "acme_copy"}, version="2.0")
    install(shadowed, "acme-copy", new, methods={"acme_copy": "acme_copy", "acme_dropped": "acme_copy"})
    path = os.pathsep.join([str(site), str(shadowed), str(SOURCE)])
    script = """
        found = peft_core.available_methods()
        loaded = peft_core.load_method("acme_copy")
        answer([found["acme_copy"].version, "acme_dropped" in found, loaded.source.version])
    """
    assert ask(site, script, PYTHONPATH=path) == ["2.0", False, "2.0"]


@pytest.mark.parametrize(
    ("requirement", "version", "fits"),
    [
        ("peft-core>=0.1,<0.2", "0.1.0", True),
        ("Peft_Core>=0.1,<0.2", "0.2.0", False),
        ("peft-core>=0.1,<0.2", "0.1.1.dev3", True),
        ("peft-core>=0.1,<0.2", "0.1.0.dev3", False),
        ("peft-core>=0.1,<0.2", "0.2.0.dev1", False),
        ("peft-core", "7", True),
        ("peft-core-extras>=9", "0.1.0", True),
        ("peft-core>=9", None, True),
    ],
)
def test_version_ranges(requirement: str, version: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "core_version", lambda: version)
    source = discovery.Source("acme-dist", "1.0")
    entry = discovery.Entry(discovery.METHODS, "acme", "acme", source, (requirement,))
    if fits:
        discovery.check_metadata(entry)
    else:
        with pytest.raises(errors.MethodVersionError, match=r"acme-dist 1\.0"):
            discovery.check_metadata(entry)


# -- messages that need no plugin ---------------------------------------------------------------------------


def test_known_methods_get_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "known_methods", lambda: {"acme_known": "acme-dist"})
    with pytest.raises(errors.MethodNotFoundError, match="To get 'acme_known': pip install acme-dist"):
        peft_core.load_method("acme_known")
    with pytest.raises(errors.MethodNotFoundError) as caught:
        peft_core.load_method("acme-knwon")
    assert "Did you mean 'acme_known'?" in str(caught.value)
    assert "To get 'acme_known': pip install acme-dist" in str(caught.value)


def test_the_writer_of_a_checkpoint_is_quoted_and_not_recommended() -> None:
    with pytest.raises(errors.MethodNotFoundError) as caught:
        peft_core.load_method("acme_unknown", wrote_by="evil\n$(rm)" + "x" * 1000)
    message = str(caught.value)
    assert r"'evil\n$(rm)x" in message
    assert "only if you trust it" in message
    assert "pip install evil" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", [None, 42, "", ["x"]])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(errors.MethodNotFoundError, match="non-empty string, not"):
        peft_core.load_method(name)


def test_a_long_name_costs_nothing() -> None:
    with pytest.raises(errors.MethodNotFoundError) as caught:
        peft_core.load_method("a" * 10_000_000)
    assert len(str(caught.value)) < 1000


def test_the_directory_of_known_methods_is_up_to_date() -> None:
    assert known_methods.TARGET.read_text() == known_methods.render()


# -- the package itself -------------------------------------------------------------------------------------


def test_exports_are_lazy_complete_and_spelt_right(make_site: Callable[[], Path]) -> None:
    heavy, kinds = ask(
        make_site(),
        """
        names = [name for name in peft_core.__all__ if getattr(peft_core, name) is not None]
        assert peft_core.__version__ == "0.1.5"
        assert set(peft_core.__all__) <= set(dir(peft_core))
        answer([[m for m in ("transformers", "accelerate", "huggingface_hub", "peft") if m in sys.modules],
                [name for name in names if type(getattr(peft_core, name)).__name__ == "module"]])
        """,
    )
    assert heavy == []
    assert kinds == [], "a submodule hides a public name"
    assert sorted(peft_core._HOME) == sorted(set(peft_core.__all__) - {"__version__"})
    with pytest.raises(AttributeError, match="Did you mean 'load_method'"):
        _ = peft_core.load_methd  # type: ignore[attr-defined]


# -- extensions ---------------------------------------------------------------------------------------------


def test_installed_extensions_load_on_first_use_and_a_broken_one_is_named(
    make_site: Callable[[], Path],
) -> None:
    site = make_site()
    layer = "import peft_core\n@peft_core.hookimpl\ndef peft_checkpoint(path): return ({'found': str(path)}, {})\n"
    install(site, "acme-store", {"acme_store.py": layer}, extensions={"acme_store": "acme_store"})
    install(
        site,
        "acme-wreck",
        {"acme_wreck.py": layer.replace("(path)", "(file)")},
        extensions={"acme_wreck": "acme_wreck"},
    )
    install(site, "acme-fine", {"acme_fine.py": method("acme_fine")}, methods={"acme_fine": "acme_fine"})
    script = """
        import pathlib
        from peft_core.extensions import extensions
        from peft_core.hook_results import call_extensions
        def loaded(): return sorted(m for m in sys.modules if m.startswith("acme"))
        peft_core.load_method("acme_fine")
        steps = [loaded()]
        for _ in range(2):
            try:
                answer = call_extensions("peft_checkpoint", path=pathlib.Path("x"), model=None)[0]["found"]
            except peft_core.MethodError as error:
                answer = f"{type(error).__name__}: {error}"
            # The packages of this workspace may have extensions too.
            steps += [answer, loaded(), [name for name in extensions.names() if name.startswith("acme")]]
        print(json.dumps(steps))
    """
    names = ["acme_store of acme-store 1.0"]
    steps = ask(site, script)
    assert steps[0] == ["acme_fine"]
    assert steps[1] == steps[4]
    for words in (
        "MethodContractError: The extension 'acme_wreck' (acme-wreck 1.0",
        "peft_checkpoint has no argument 'file'",
        "go on without it, start Python with PEFT_CORE_DISABLE_PLUGINS=acme_wreck",
    ):
        assert words in steps[1]
    assert steps[2:4] == steps[5:7] == [["acme_fine", "acme_store"], names]

    without = ask(site, script, PEFT_CORE_DISABLE_PLUGINS="acme_wreck")
    assert without[1:4] == without[4:7] == ["x", ["acme_fine", "acme_store"], names]

    done = run(site, "-m", "peft_core", "check", check=False)
    assert done.returncode == 1
    assert "method acme_fine: ok" in done.stdout
    assert "extension acme_store: ok\nextension acme_wreck: MethodContractError\n" in done.stdout
    table = run(site, "-m", "peft_core", "methods", PEFT_CORE_DISABLE_PLUGINS="acme_wreck").stdout
    assert ["acme_wreck", "acme-wreck", "1.0", "disabled"] in [line.split() for line in table.splitlines()]

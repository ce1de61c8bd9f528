"""`python -m peft_core check --contract`: the contract suite for an installed method, without a test file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_core.config import AdapterConfig
from peft_core.errors import ConfigError, MethodContractError, PeftError, TargetError
from peft_core.methods import Method, available_methods, load_method
from peft_core.plain_data import type_name

from .contract import MethodContract
from .probe import probe

_SHOWN_CASES = 6

collected: dict[str, type[MethodContract]] = {}
"""What the file that pytest collects takes its classes from."""

_FILE = "from peft_core.testing.command import collected\n\nglobals().update(collected)\n"


def check_contract(name: str, config: str | None = None, *, select: str = "", tracebacks: bool = False) -> bool:
    """Run the contract suite on a method, print what was found, and say whether every promise is kept.

    What the suite must know of a method is found out by trial: which layers it adapts, refuses and merges. A plugin
    that knows better says so in a module of its own next to the method's, called `<method's module>_contract`: for
    `acme.turn` that is `acme.turn_contract`. The subclasses of `MethodContract` in it whose names begin with `Test` are
    run in place of the trial:

        from peft_core.testing import MethodContract
        from .turn import TurnConfig

        class TestTurn(MethodContract):
            config = TurnConfig(r=4)
            exact_gradients = False  # the norm is held constant, as in the paper

    The module is imported by this command alone, so that the method itself needs no pytest; a test file can import
    the classes from there. It is needed where a trial cannot know: for values of request arguments
    (`call_arguments`), for approximations (`tolerance`, `exact_gradients`), for tensors without a gradient (`unused`).

    Args:
        config: fields of the method's config as a JSON object; the others keep their defaults, or what the plugin's
            own classes give them.
        select: as pytest's `-k`.
        tracebacks: let pytest print, with tracebacks.

    Raises:
        PeftError: the method cannot be loaded, or the config is not valid.
    """
    method = load_method(name)
    fields = _fields(config)
    classes = _shipped(method, fields)
    if classes:
        print(f"{method.label}: as {', '.join(classes)} of its package say")
    else:
        classes = _probed(method, fields)
    return run(classes, select, tracebacks)


def _fields(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--config is not JSON ({error}); write for instance --config '{{\"r\": 4}}'") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--config is a JSON object of the config's fields, not {type_name(fields)}")
    return fields


def _shipped(method: Method, fields: Mapping[str, Any]) -> dict[str, type[MethodContract]]:
    """The contract classes of the plugin's package."""
    info = available_methods().get(method.name)
    # Not for what was registered in this process: it has no module that an import could find.
    name = f"{info.module}_contract" if info and info.distribution else ""
    try:
        if not name or importlib.util.find_spec(name) is None:
            return {}
        module = importlib.import_module(name)
    except Exception as error:
        raise MethodContractError(
            f"The {method.label} has settings for its contract in {name}, which cannot be imported: "
            f"{type(error).__name__}: {error}\nRepair that module, or remove it to have them found out by trial."
        ) from error
    classes = {
        key: value
        for key, value in vars(module).items()
        if key.startswith("Test")
        and isinstance(value, type)
        and issubclass(value, MethodContract)
        and value.__module__ == name
    }
    if not classes:
        raise MethodContractError(
            f"The {method.label} comes with {name}, which holds no contract.\nDefine a subclass of "
            "peft_core.testing.MethodContract in it, named Test..., or remove it to have the settings found by trial."
        )
    if not fields:
        return classes
    for key, value in classes.items():
        if isinstance(getattr(value, "config", None), AdapterConfig):  # what has none is told so by the suite
            classes[key] = type(key, (value,), {"config": value.config.resolve(**fields)})
    return classes


def _probed(method: Method, fields: Mapping[str, Any]) -> dict[str, type[MethodContract]]:
    try:
        config = method(**fields)
    except ConfigError as error:
        raise ConfigError(f"{error}\nThe contract needs a config; give the fields with --config '{{...}}'") from error
    found = probe(config)
    if not found.kinds:
        kinds: dict[str, list[str]] = {}
        for kind, reason in found.reasons.items():
            kinds.setdefault(reason, []).append(kind)
        reasons = "\n".join(f"{', '.join(names)}: {reason}" for reason, names in kinds.items())
        raise TargetError(
            f"The {method.label} adapts none of the suite's layers with this config:\n{reasons}\n"
            "Give other fields with --config '{...}', or settings in the plugin (see the documentation of --contract)."
        )
    print(f"{method.label}\n{found}")
    if type(config).request_arguments:
        print(f"  takes {', '.join(type(config).request_arguments)}: calls are made without")
    name = "Test" + "".join(part.capitalize() for part in method.name.split("_"))
    return {name: type(name, (MethodContract,), found.attributes)}


# -- running -----------------------------------------------------------------------------------------------------


class _Outcomes:
    """A plugin of pytest that keeps what it reports."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: dict[tuple[str, str], list[tuple[str, str]]] = {}
        """(class, test) -> (case, message)"""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            _, kind, test = report.nodeid.split("::", 2)
            name, _, case = test.partition("[")
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(report.longrepr)
            if crash is not None:
                ours = re.match(r"[\w.]*BrokenPromise: ", crash.message)
                message = crash.message[ours.end() :] if ours else f"{crash.path}:{crash.lineno}: {crash.message}"
            self.failed.setdefault((kind, name), []).append((case.rstrip("]"), message))
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.setdefault(("collection", report.nodeid), []).append(("", str(report.longrepr)))

    def print(self) -> None:
        """Each test once, and tests that fail by one fault together: the author is led to it, not buried."""
        together: dict[tuple[str, str], list[str]] = {}
        messages: dict[tuple[str, str], str] = {}
        for (kind, test), seen in self.failed.items():
            cases = [case for case, _ in seen if case]
            more = f" and {len(cases) - _SHOWN_CASES} more" if len(cases) > _SHOWN_CASES else ""
            where = f" [{', '.join(cases[:_SHOWN_CASES])}{more}]" if cases else ""
            key = (kind, _fault(seen[0][1]))
            together.setdefault(key, []).append(test + where)
            messages.setdefault(key, seen[0][1].strip())
        for (kind, fault), tests in together.items():
            names = tests[0] if len(tests) == 1 else f"{tests[0]}\n  and {len(tests) - 1} more with what is seen here:"
            others = "".join(f"\n    {name}" for name in tests[1:])
            print(f"\nFAILED {kind}.{names}{others}\n  {messages[kind, fault]}")


def _fault(message: str) -> str:
    """What failures by one fault have in common: what was seen, and where to look, whatever the promise."""
    seen = re.search(r"^  seen: .*", message, re.MULTILINE | re.DOTALL)
    raised = re.search(r"^  look at: \S+ \(.*?, line \d+\)", message, re.MULTILINE)
    if seen and raised:  # the line of the plugin that raised; what else to look at depends on the promise
        return message[seen.start() : raised.end()]
    return message[seen.start() :] if seen else message


def run(classes: Mapping[str, type[MethodContract]], select: str = "", tracebacks: bool = False) -> bool:
    """Run contract classes, by name, under pytest in this process, and print what failed."""
    outcomes, start = _Outcomes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _alone():
        # Settings of its own: those of a project that happens to be around must not change what is proved.
        # A name of its own, too: Python imports one name once.
        ini, file = Path(folder, "pytest.ini"), Path(folder, f"test_{Path(folder).name}.py")
        ini.write_text("[pytest]\n")
        file.write_text(_FILE)
        options = ["-c", str(ini), "--rootdir", folder, "--import-mode=importlib", "-p", "no:cacheprovider"]
        options += ["--tb=short"] if tracebacks else ["-p", "no:terminal"]
        collected.clear()
        collected.update(classes)
        code = pytest.main([*options, *(["-k", select] if select else []), str(file)], plugins=[outcomes])
    if not tracebacks:
        outcomes.print()
    failed = sum(map(len, outcomes.failed.values()))
    print(f"\n{outcomes.passed} checks passed, {failed} failed, in {time.perf_counter() - start:.1f} s")
    if not failed and code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise PeftError(f"pytest itself failed ({code}); run again with --tracebacks to see why")
    return not failed and outcomes.passed > 0


@contextmanager
def _alone() -> Iterator[None]:
    """pytest without options and plugins from the environment."""
    changed = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": ""}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Finding out by trial what a method adapts, refuses and merges: the settings of a suite that nobody wrote."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from peft_core.config import AdapterConfig
from peft_core.errors import MergeError, TargetError

from .catalogue import CASES, Case
from .checks import BrokenPromise, gap
from .models import Holder, TinyNet, seeded, token_ids
from .setup import Setup, record


@dataclass
class Findings:
    """What a method does on the suite's layers and model. `attributes` are settings for its contract class."""

    config: AdapterConfig
    kinds: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    unmerged: list[str] = field(default_factory=list)
    starts_as_base: bool | None = None
    rowwise: bool | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a kind of layers was refused, by its name."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The class attributes of `Setup`."""
        return {
            "config": self.config,
            "layer_kinds": tuple(self.kinds),
            "refused_cases": tuple(self.refused),
            "left_out": tuple(self.left_out),
            "mergeable": bool(self.merged),
            "unmergeable_cases": tuple(self.unmerged if self.merged else ()),
        }

    def __str__(self) -> str:
        kinds = {case.kind for case in CASES.values()}
        rows = {
            "adapts": ", ".join(self.kinds) or "nothing",
            "refuses": ", ".join(sorted(kinds - set(self.kinds))) or "nothing",
            "refuses of what it adapts": ", ".join([*self.refused, *self.left_out]) or "nothing",
            "merges": "yes" if self.merged else "no",
            "cannot merge": ", ".join(self.unmerged) if self.merged else "",
            "starts as base": _said(self.starts_as_base),
            "one adapter per row": _said(self.rowwise),
        }
        width = max(map(len, rows)) + 2
        return "\n".join(f"  {name + ':':<{width}}{value}" for name, value in rows.items() if value)


def _said(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"


def probe(config: AdapterConfig) -> Findings:
    """Try a config on every case of the catalogue and every module of the suite's model.

    A kind of layers counts as adapted where one of its cases is adapted and can be called; a case that then raises
    anything but a refusal is left to the suite, which says what is wrong with it.
    """
    found = Findings(config)
    setup = _setup(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "target_modules" not in type(config).model_fields:
            _probe_model(found, setup)
        else:
            for kind in dict.fromkeys(case.kind for case in CASES.values()):
                _probe_kind(found, setup, kind)
            _probe_modules(found, setup)
    return found


def _setup(config: AdapterConfig) -> Setup:
    made: Any = type("Probe", (Setup,), {"config": config})
    setup: Setup = made()
    return setup


def _probe_kind(found: Findings, setup: Setup, kind: str) -> None:
    refused, adapted, runs = [], [], False
    for case in CASES.values():
        if case.kind != kind:
            continue
        try:
            model = setup.adapted(base=Holder(seeded(case.make)), config=setup.configure(["layer"]))
        except BrokenPromise as error:
            if isinstance(error.__cause__, TargetError):
                refused.append(case.name)
            found.reasons.setdefault(kind, str(error.__cause__))
            continue
        adapted.append(case)
        runs = _runs(setup, model, case) or runs
        merges = _merges(model)
        if merges is not None:
            (found.merged if merges else found.unmerged).append(case.name)
    # Calls that need request arguments cannot be tried: nobody said which values they take.
    if adapted and (runs or type(setup.config).request_arguments):
        found.kinds.append(kind)
        found.refused += refused
    else:
        for names in (found.merged, found.unmerged):
            names[:] = [name for name in names if CASES[name].kind != kind]


def _runs(setup: Setup, model: Any, case: Case) -> bool:
    args, kwargs = case.inputs()
    try:
        expected = setup.run(seeded(case.make), *args, **kwargs)
        return gap(setup.run(model, *args, rows=case.rows, **kwargs), expected) < float("inf")
    except BrokenPromise:
        return False


def _merges(model: Any) -> bool | None:
    """Whether the active adapters merge; None where that is for the suite to say."""
    try:
        model.merge_adapter()
    except MergeError:
        return False
    except Exception:
        return None
    return True


def _probe_modules(found: Findings, setup: Setup) -> None:
    for path in TinyNet.targets(found.kinds):
        try:
            model = setup.adapted(config=setup.configure([path]))
        except BrokenPromise as error:
            if isinstance(error.__cause__, TargetError):
                found.left_out.append(path)
            continue
        adapters = record(model, "a").adapters
        found.starts_as_base = found.starts_as_base is not False and all(a.starts_as_base for a in adapters)
        found.rowwise = found.rowwise is not False and all(a.rowwise for a in adapters)
        if found.merged and _merges(model) is False:
            found.left_out.append(path)


def _probe_model(found: Findings, setup: Setup) -> None:
    """A method that chooses its places by itself."""
    try:
        model = setup.adapted(config=setup.config)
        if not type(setup.config).request_arguments:
            setup.run(model, token_ids())
    except BrokenPromise as error:
        found.reasons["model"] = str(error.__cause__)
        return
    found.kinds.append("model")
    adapters = record(model, "a").adapters
    found.starts_as_base = all(a.starts_as_base for a in adapters)
    found.rowwise = all(a.rowwise for a in adapters)
    if _merges(model) is not False:
        found.merged.append("model")

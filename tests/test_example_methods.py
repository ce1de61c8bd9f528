"""Methods as a stranger writes them: how long they are, what they import, and the contract suite on each."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.methods import bitfit, bottleneck, ia3, ln_tuning, poly
from peft_core.testing import CASES, MethodContract

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# File and the most lines it may have, its config among them: neither blank, nor comment, nor docstring.
BARS = {
    "acme-vera/src/acme_vera.py": 60,
    "methods/ia3.py": 60,
    "methods/bottleneck.py": 60,
    "methods/ln_tuning.py": 40,
    "methods/bitfit.py": 40,
    "methods/poly.py": 80,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def code_lines(source: str) -> int:
    tree = ast.parse(source)
    docstrings = [n.body[0] for n in ast.walk(tree) if isinstance(n, DOCUMENTED) and ast.get_docstring(n) is not None]
    skipped = {line for text in docstrings for line in range(text.lineno, (text.end_lineno or 0) + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(text.strip()) and not text.strip().startswith("#") and n not in skipped for n, text in lines)


def test_lines_are_counted_as_promised() -> None:
    source = (
        '"""One\n\ntwo."""\n\n# a comment\nx = """a\nb"""  # text, not a docstring\n\n\ndef f():\n    """Three."""\n'
    )
    assert code_lines(source) == 3


@pytest.mark.parametrize("file", BARS)
def test_size(file: str) -> None:
    source = (EXAMPLES / file).read_text()
    assert code_lines(source) <= BARS[file]
    assert max(len(line) for line in source.splitlines()) <= 120


@pytest.mark.parametrize("file", BARS)
def test_only_the_public_api_is_used(file: str) -> None:
    tree = ast.parse((EXAMPLES / file).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {"peft_core", "pydantic", "torch", "typing", "collections.abc"}
    assert {m for m in modules if m not in allowed and not m.startswith("torch.")} == set()


class TestIA3Outputs(MethodContract):
    plugin = ia3
    config = ia3.IA3Config(feedforward_modules=[])


class TestIA3Inputs(MethodContract):
    plugin = ia3
    config = ia3.IA3Config(feedforward_modules=[])

    def configure(self, targets: list[str]) -> Any:
        return self.config.resolve(target_modules=targets, feedforward_modules=targets)


class TestIA3NoisyStart(MethodContract):
    plugin = ia3
    config = ia3.IA3Config(feedforward_modules=[], init_ia3_weights=False)


class TestBottleneck(MethodContract):
    plugin = bottleneck
    config = bottleneck.BottleneckConfig(r=3, activation="gelu")
    mergeable = False


class TestLnTuning(MethodContract):
    plugin = ln_tuning
    config = ln_tuning.LnTuningConfig()
    layer_kinds = ("norm", "linear", "conv1d", "conv2d", "conv3d", "embedding")


class TestBitFit(MethodContract):
    plugin = bitfit
    config = bitfit.BitFitConfig()
    layer_kinds = ("norm", "linear", "conv1d", "conv2d", "conv3d")
    refused_cases = ("linear-no-bias", "conv1d-no-bias", "conv2d-no-bias", "norm-rms")

    def configure(self, targets: list[str]) -> Any:
        # What has no bias: the suite's down projections, and a Llama's norms.
        without = ("blocks.0.down", "blocks.1.down", "input_layernorm", "norm")
        return self.config.resolve(target_modules=[name for name in targets if name not in without])


class TestPoly(MethodContract):
    plugin = poly
    config = poly.PolyConfig(r=2, n_skills=3)


class TestPolyTasks(MethodContract):
    plugin = poly
    config = poly.PolyConfig(r=2, n_skills=3, n_tasks=2)

    def call_arguments(self, rows: int) -> dict[str, Any]:
        return {"task_ids": torch.arange(rows) % 2}

    def merge_arguments(self) -> dict[str, Any]:
        return {"task_ids": 1}


class TestPolySplits(MethodContract):
    plugin = poly
    config = poly.PolyConfig(r=2, n_skills=3, n_splits=4, init_weights=False)


def test_refused_cases_are_those_without_a_bias() -> None:
    """Case by case, so that none is left out of the suite for another reason."""
    kinds = set(TestBitFit.layer_kinds)
    without = {c.name for c in CASES.values() if c.kind in kinds and getattr(c.make(), "bias", None) is None}
    assert without == set(TestBitFit.refused_cases)

"""What must not rot: the core knows no method, stays light, and asks no plugin while a model runs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from peft import PeftType
from transformers import LlamaConfig, LlamaForCausalLM

from peft_core import available_methods, get_peft_model, load_method

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "packages" / "peft-core"
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
HEAVY = {"transformers", "accelerate", "huggingface_hub", "peft", "datasets", "scipy", "pandas", "regex"}


def words(text: str) -> list[str]:
    """Lower-case words of an identifier or a text: `LoraConfig`, `lora_A` and "uses LoRA." all have "lora"."""
    whole = re.findall(r"[a-z0-9]+", text.lower())
    parts = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower())
    return whole if whole == parts else whole + parts


def names_and_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier and every string of a module, docstrings too, with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname", "module", "rest"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield line, node.value
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((line, name) for name in node.names)


def method_names() -> set[str]:
    found = {kind.value.lower() for kind in PeftType} | set(available_methods())
    assert {"lora", "ia3", "prompt_tuning"} <= found
    assert len(found) >= 45
    return found


def mentions(tree: ast.AST, methods: set[str]) -> list[tuple[int, str]]:
    found = []
    for line, text in names_and_texts(tree):
        joined = " ".join(["", *words(text), ""])
        found += [(line, name) for name in methods if f" {' '.join(words(name))} " in joined]
    return found


def test_core_holds_no_methods_name() -> None:
    methods = method_names()
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(CORE.glob("src/**/*.py"))
        for line, name in mentions(ast.parse(path.read_text()), methods)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("class LoraConfig: pass", "lora"),
        ("lora_A = 1", "lora"),
        ("x.is_lora", "lora"),
        ("f(lora=1)", "lora"),
        ("import peft_lora", "lora"),
        ("def f(): 'uses LoRA.'", "lora"),
        ("kind == 'PROMPT_TUNING'", "prompt_tuning"),
        ("kind = 'ia3'", "ia3"),
    ],
)
def test_the_search_finds_names(code: str, name: str) -> None:
    assert name in {found for _, found in mentions(ast.parse(code), method_names())}


def test_cores_own_tests_import_no_plugin() -> None:
    """So they pass where no plugin is installed."""
    plugins = {f"peft_{package.name.removeprefix('peft-')}" for package in PACKAGES} - {"peft_core"}
    assert len(plugins) == len(PACKAGES) - 1
    imported = [
        (path.name, name)
        for path in sorted(CORE.glob("tests/**/*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imports(node)
        if name.partition(".")[0] in plugins
    ]
    assert not imported


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(found)


@pytest.mark.parametrize("package", [path.name.replace("-", "_") for path in PACKAGES])
def test_importing_a_package_imports_nothing_else(package: str) -> None:
    imported = modules_after(f"import {package}")
    assert not imported & (HEAVY | {"torch", "pydantic", "pluggy", "safetensors"})
    own = {name for name in imported if name.startswith(f"{package}.")}
    assert not own, f"submodules imported: {sorted(own)}"


def test_listing_methods_imports_no_plugin() -> None:
    imported = modules_after("import peft_core; peft_core.available_methods()")
    assert "torch" not in imported
    assert not {entry.module for entry in available_methods().values()} & imported


def test_loading_all_methods_imports_nothing_heavy() -> None:
    imported = modules_after(
        "import peft_core\nfor name in peft_core.available_methods(): peft_core.load_method(name)\n"
        "peft_core.get_peft_model, peft_core.PeftModel"
    )
    assert {entry.module for entry in available_methods().values()} <= imported
    assert not imported & (HEAVY - {"regex"})  # patterns are compiled by it, and it is small


@pytest.fixture
def hook_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the hooks called while the test runs, in any plugin manager."""
    calls: list[str] = []
    original = pluggy.HookCaller.__call__

    def counting(self: pluggy.HookCaller, **kwargs: Any) -> Any:
        calls.append(self.name)
        return original(self, **kwargs)

    monkeypatch.setattr(pluggy.HookCaller, "__call__", counting)
    return calls


def test_no_hook_runs_per_forward_or_token(hook_calls: list[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens))
    model = get_peft_model(model, load_method("lora")(r=2), "a")
    model.add_adapter("b", load_method("ia3")())
    assert {"peft_prepare", "peft_build"} <= set(hook_calls), "the counter counts"
    ids = torch.arange(2, 12).view(2, 5)
    for active in ("a", "b", ["a", "b"]):
        model.set_adapter(active)
        hook_calls.clear()
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=3, do_sample=False)
            model(ids, adapter_names=["b", "a"])
            with model.disable_adapter():
                model(ids)
        assert hook_calls == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_modules_can_be_read_in_one_sitting(package: Path) -> None:
    lengths = {
        str(path.relative_to(package)): len(path.read_text().splitlines()) for path in package.glob("src/**/*.py")
    }
    assert not {name: length for name, length in lengths.items() if length > 400}

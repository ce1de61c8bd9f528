"""Methods and extensions registered at run time, and the check of what hooks return where they return it."""

from __future__ import annotations

import copy
import pickle
import re
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from peft_core import (
    Adapter,
    AdapterConfig,
    AdapterState,
    BaseLayer,
    MethodClashError,
    MethodContractError,
    MethodNotFoundError,
    SiteRequest,
    Structure,
    available_methods,
    hookimpl,
    load_method,
    methods,
    register_method,
    unregister_method,
)
from peft_core.discovery import Source
from peft_core.extensions import extensions
from peft_core.hook_results import CHECKS, call, call_extensions
from peft_core.hookspecs import ExtensionSpecs, MethodSpecs


class AcmeConfig(AdapterConfig):
    peft_type: ClassVar[str] = "ACME"
    r: int = 8


def plugin(name: str = "acme_module", **hooks: Callable[..., Any]) -> types.ModuleType:
    """A module that implements the two required hooks, and those given."""
    module = types.ModuleType(name)
    implementations = {"peft_config": lambda: AcmeConfig, "peft_build": lambda layer: None, **hooks}
    for hook, function in implementations.items():
        setattr(module, hook, hookimpl(function))
    return module


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    methods._registered.clear()
    for name in [name for name, entry in extensions._entries.items() if entry is None]:  # not the installed ones
        extensions.unregister(name)


# -- registering --------------------------------------------------------------------------------------------


def test_a_registered_method_is_found_copied_and_pickled() -> None:
    method = register_method(plugin())
    assert load_method("Acme") is method
    assert method.source == Source()
    assert str(method.source) == "registered at run time"
    assert available_methods()["acme"].module == "acme_module"
    assert method(r=3) == AcmeConfig(r=3)
    assert copy.deepcopy(method) is copy.copy(method) is pickle.loads(pickle.dumps(method)) is method
    with pytest.raises(AttributeError):
        method.name = "other"

    unregister_method("ACME")
    for forget in (unregister_method, load_method):
        with pytest.raises(MethodNotFoundError, match=r"'(acme|ACME)'"):
            forget("ACME")


def test_an_object_with_state_is_a_plugin() -> None:
    class Acme:
        def __init__(self) -> None:
            self.keys: list[str] = []

        @hookimpl
        def peft_config(self) -> type[AdapterConfig]:
            return AcmeConfig

        @hookimpl
        def peft_build(self, layer: BaseLayer) -> Adapter:
            raise NotImplementedError

        @hookimpl
        def peft_state_key(self, key: str) -> str:
            self.keys.append(key)
            return key.upper()

    with pytest.raises(MethodContractError, match="pass an instance"):
        register_method(Acme)
    acme = Acme()
    assert call(register_method(acme), "peft_state_key", config=AcmeConfig(), key="a") == "A"
    assert acme.keys == ["a"]


def test_a_taken_name_needs_replace() -> None:
    first = register_method(plugin("first"))
    with pytest.raises(MethodClashError, match="Pass replace=True") as caught:
        register_method(plugin("second"))
    assert "'acme' (registered at run time, second)" in str(caught.value)
    assert "'acme' (registered at run time, first)" in str(caught.value)
    assert load_method("acme") is first
    assert register_method(plugin("second"), replace=True) is load_method("acme") is not first


def test_a_failed_registration_leaves_nothing_and_can_be_repaired() -> None:
    broken = plugin(peft_merge=lambda config, adapter, parameters: parameters)
    for _ in range(2):
        with pytest.raises(MethodContractError, match="Did you mean 'params'"):
            register_method(broken)
        assert "acme" not in available_methods()
    broken.peft_merge = hookimpl(lambda params: params)  # type: ignore[attr-defined]
    assert register_method(broken) is load_method("acme")


@pytest.mark.parametrize("peft_type", [None, "", "acme", 7])
def test_a_config_needs_a_proper_peft_type(peft_type: Any) -> None:
    class Bare(AdapterConfig):
        pass

    if peft_type is not None:
        Bare.peft_type = peft_type
    with pytest.raises(MethodContractError, match="Correct the class variable peft_type") as caught:
        register_method(plugin(peft_config=lambda: Bare))
    assert f"peft_type is {peft_type!r}" in str(caught.value)


def test_each_method_has_its_own_hooks() -> None:
    class OtherConfig(AcmeConfig):
        peft_type: ClassVar[str] = "OTHER"

    acme = register_method(plugin(peft_state_key=lambda key: "acme." + key))
    other = register_method(plugin("other", peft_config=lambda: OtherConfig))
    assert call(acme, "peft_state_key", config=acme(), key="a") == "acme.a"
    assert call(other, "peft_state_key", config=other(), key="a") == "a"


def test_hook_calls_are_traced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PEFT_TRACE_HOOKS", "1")
    method = register_method(plugin(peft_match=lambda path: 1 / 0))
    call(method, "peft_state_key", config=method(), key="k" * 100)
    with pytest.raises(ZeroDivisionError):
        call(method, "peft_match", config=method(), path="a.b", module=nn.Linear(2, 2), model=nn.Linear(2, 2))
    out = capsys.readouterr()
    assert out.out == ""
    assert "acme_module: peft_config() asks acme_module" in out.err
    assert "peft_config -> AcmeConfig" in out.err
    assert f"peft_state_key(config=<AcmeConfig>, key='{'k' * 60}…') asks peft_core.defaults" in out.err
    assert "peft_match(config=<AcmeConfig>, path='a.b', module=<Linear>, model=<Linear>)" in out.err
    assert "peft_match raised ZeroDivisionError" in out.err

    monkeypatch.setenv("PEFT_TRACE_HOOKS", "0")
    register_method(plugin(), replace=True)
    assert capsys.readouterr().err == ""


# -- results ------------------------------------------------------------------------------------------------


class Nothing(Adapter):
    """An adapter in name only: the checks look at the type."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


ADAPTER = Nothing()
REQUEST = SiteRequest("a.b")
TENSORS = {"weight": torch.zeros(1)}
CONFIG = AdapterConfig()
LAYER = BaseLayer.__new__(BaseLayer)
STRUCTURE = Structure({"a.b": nn.Linear(1, 1)})
STATE = AdapterState(CONFIG, {"a.b": TENSORS})
GROUPS = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2}]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "peft_config": {},
    "peft_match": {"config": None, "path": "a", "module": None, "model": None},
    "peft_resolve": {"config": CONFIG, "model": None, "matched": ()},
    "peft_structure": {"config": None, "model": None},
    "peft_sites": {"config": None, "model": None, "matched": ()},
    "peft_prepare": {"model": None, "name": "x", "config": None, "layers": [], "shared": None, "trusted": True},
    "peft_build": {"config": None, "layer": None, "shared": None, "model": None, "tensors": None},
    "peft_merge": {"config": None, "adapter": ADAPTER, "params": TENSORS, "arguments": {}},
    "peft_calibrate": {"model": None, "name": "x", "config": None, "layers": [], "batches": None},
    "peft_combine": {"model": None, "name": "x", "sources": [], "how": "sum", "config": None, "options": {}},
    "peft_step": {
        "model": None,
        "name": "x",
        "config": None,
        "adapters": {},
        "shared": None,
        "event": "before",
        "step": 0,
        "optimizer": None,
    },
    "peft_param_groups": {"config": None, "parameters": {}, "lr": 0.1, "weight_decay": 0.0},
    "peft_state_key": {"config": None, "key": "a"},
    "peft_layer": {"path": "a", "module": None},
    "peft_architectures": {},
    "peft_checkpoint": {"path": Path("a"), "model": None},
    "peft_export": {"save_format": "acme", "path": Path("a"), "config": {}, "tensors": {}, "model": None},
}
RIGHT: list[tuple[str, Any, Any]] = [
    ("peft_match", True, True),
    ("peft_match", False, False),
    ("peft_match", None, None),
    ("peft_resolve", CONFIG, CONFIG),
    ("peft_resolve", None, CONFIG),
    ("peft_structure", STRUCTURE, STRUCTURE),
    ("peft_structure", None, None),
    ("peft_sites", [REQUEST], [REQUEST]),
    ("peft_sites", (), []),
    ("peft_prepare", None, None),
    ("peft_build", ADAPTER, ADAPTER),
    ("peft_merge", TENSORS, TENSORS),
    ("peft_state_key", "b", "b"),
    ("peft_calibrate", STATE, STATE),
    ("peft_calibrate", None, None),
    ("peft_combine", STATE, STATE),
    ("peft_combine", None, None),
    ("peft_step", CONFIG, CONFIG),
    ("peft_step", None, None),
    ("peft_param_groups", GROUPS, GROUPS),
    ("peft_param_groups", None, None),
    ("peft_layer", LAYER, LAYER),
    ("peft_layer", None, None),
    ("peft_architectures", {"acme": {"query": ["q"]}}, [{"acme": {"query": ["q"]}}]),
    ("peft_checkpoint", ({}, TENSORS), ({}, TENSORS)),
    ("peft_export", True, True),
    ("peft_export", None, None),
]
WRONG: list[tuple[str, Any, str]] = [
    ("peft_match", re.match("a", "a"), "a re.Match"),
    ("peft_match", 1, "1 (int)"),
    ("peft_resolve", {"r": 1}, "a dict that starts with 'r': 1 (int)"),
    ("peft_structure", {"a.b": nn.Linear(1, 1)}, "a dict that starts with 'a.b': a torch.nn"),
    ("peft_structure", Structure({"a.b": nn.Linear}), "Structure"),
    ("peft_sites", "a.b", "'a.b' (str)"),
    ("peft_sites", ["a.b"], "a list that starts with 'a.b' (str)"),
    ("peft_sites", REQUEST, "SiteRequest"),
    ("peft_prepare", TENSORS, "a dict that starts with 'weight'"),
    ("peft_build", None, "None"),
    ("peft_build", Adapter, "the class Adapter"),
    ("peft_build", nn.Linear(1, 1), "Linear"),
    ("peft_merge", TENSORS["weight"], "a torch.Tensor"),
    ("peft_merge", {"weight": 1.0}, "a dict that starts with 'weight': 1.0 (float)"),
    ("peft_state_key", ["a"], "a list that starts with 'a'"),
    ("peft_state_key", "", "'' (str)"),
    ("peft_calibrate", {"lora_A": TENSORS}, "a dict that starts with 'lora_A': a dict"),
    ("peft_calibrate", AdapterState(CONFIG, {"a": {"u": 1.0}}), "AdapterState"),
    ("peft_combine", CONFIG, "AdapterConfig"),
    ("peft_step", 1.0, "1.0 (float)"),
    ("peft_param_groups", {"params": []}, "a dict that starts with 'params'"),
    ("peft_param_groups", [{"params": [torch.zeros(1)]}], "a list that starts with a dict"),
    ("peft_layer", nn.Linear(1, 1), "Linear"),
    ("peft_architectures", {"acme": {"query": "q"}}, "a dict that starts with 'acme'"),
    ("peft_architectures", [("acme", {})], "a list that starts with a tuple"),
    ("peft_checkpoint", {}, "a builtins.dict"),
    ("peft_checkpoint", ({}, {"weight": 1}), "a tuple that starts with"),
    ("peft_export", "acme.bin", "'acme.bin' (str)"),
    ("peft_export", False, "False (bool)"),
]


def ask(hook: str, value: Any) -> Any:
    """Let a plugin return `value` from `hook`, beside an extension that has nothing to say."""
    if hook in vars(ExtensionSpecs):
        for name, result in (("acme_quiet", {} if hook == "peft_architectures" else None), ("acme", value)):
            module = types.ModuleType(name)
            # `result` is no argument of a hook, so the default stays: it binds the loop's value.
            setattr(module, hook, hookimpl(lambda result=result: result))
            extensions.register(module, name)
        return call_extensions(hook, **ARGUMENTS[hook])
    return call(register_method(plugin(**{hook: lambda: value})), hook, **ARGUMENTS[hook])


def test_every_hook_is_checked_and_tested() -> None:
    specified = {name for specs in (MethodSpecs, ExtensionSpecs) for name in vars(specs) if name[:5] == "peft_"}
    assert specified == set(CHECKS) == set(ARGUMENTS)
    assert specified - {"peft_config"} == {hook for hook, _, _ in RIGHT} == {hook for hook, _, _ in WRONG}


@pytest.mark.parametrize(("hook", "value", "result"), RIGHT)
def test_right_results_pass(hook: str, value: Any, result: Any) -> None:
    found = ask(hook, value)
    if hook == "peft_architectures":
        found = [item for item in found if item]
    assert found == result


@pytest.mark.parametrize(("hook", "value", "described"), WRONG)
def test_wrong_results_are_refused_by_name(hook: str, value: Any, described: str) -> None:
    with pytest.raises(MethodContractError) as caught:
        ask(hook, value)
    message = str(caught.value)
    assert "'acme' (registered at run time" in message
    assert described in message
    assert f"from {hook}.\nThe hook returns " in message


@pytest.mark.parametrize("value", [None, 42, AdapterConfig, AcmeConfig(), nn.Module])
def test_a_wrong_config_class_is_refused(value: Any) -> None:
    with pytest.raises(MethodContractError, match=r"from peft_config\.\nThe hook returns a subclass"):
        register_method(plugin(peft_config=lambda: value))


def test_an_exception_of_a_plugin_says_whose_it_is() -> None:
    method = register_method(plugin(peft_build=lambda layer: {}["missing"]))
    with pytest.raises(KeyError, match="missing") as caught:
        call(method, "peft_build", **ARGUMENTS["peft_build"])
    notes = "Raised in peft_build, called for the method 'acme' (registered at run time, acme_module)."
    assert caught.value.__notes__ == [notes]
    layer = BaseLayer(nn.Linear(2, 2), "blocks.0.up")
    with pytest.raises(KeyError) as caught:
        call(method, "peft_build", **{**ARGUMENTS["peft_build"], "layer": layer})
    assert caught.value.__notes__ == [notes.replace("peft_build,", "peft_build at blocks.0.up,")]


def test_a_wrong_result_says_where_it_was_asked() -> None:
    method = register_method(plugin())
    layer = BaseLayer(nn.Linear(2, 2), "blocks.0.up")
    with pytest.raises(MethodContractError) as caught:
        call(method, "peft_build", **{**ARGUMENTS["peft_build"], "layer": layer})
    assert caught.value.__notes__ == ["It was asked at blocks.0.up."]


# -- extensions ---------------------------------------------------------------------------------------------


def wrapper(name: str, hook: str, function: Callable[..., Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    setattr(module, hook, hookimpl(wrapper=True)(function))
    return module


def test_an_extension_wraps_methods_loaded_before_and_after() -> None:
    def twice(key: str) -> Generator[None, str, str]:
        return 2 * (yield)

    first = register_method(plugin())
    assert call(first, "peft_state_key", config=None, key="a") == "a"
    extensions.register(wrapper("acme_twice", "peft_state_key", twice), "twice")
    second = register_method(plugin("second"), replace=True)
    for method in (first, second):
        assert call(method, "peft_state_key", config=None, key="a") == "aa"
    extensions.unregister("twice")
    for method in (first, second):
        assert call(method, "peft_state_key", config=None, key="a") == "a"


def test_a_wrapper_is_named_when_the_result_is_wrong() -> None:
    def none() -> Iterator[Any]:
        yield
        return None

    extensions.register(wrapper("acme_none", "peft_state_key", none), "none")
    with pytest.raises(MethodContractError, match="It is wrapped by none"):
        call(register_method(plugin()), "peft_state_key", config=None, key="a")


def test_an_extension_may_not_be_a_method() -> None:
    module = types.ModuleType("acme_both")
    module.peft_state_key = hookimpl(lambda key: key)  # type: ignore[attr-defined]
    module.peft_layers = hookimpl(lambda path: None)  # type: ignore[attr-defined]
    before = extensions.names()
    with pytest.raises(MethodContractError, match=r"extension 'both' \(registered at run time") as caught:
        extensions.register(module, "both")
    assert "may only wrap a method's hooks" in str(caught.value)
    assert "no hook 'peft_layers'. Did you mean 'peft_layer'?" in str(caught.value)
    with pytest.raises(MethodContractError, match="peft_config cannot be implemented here"):
        extensions.register(wrapper("acme_config", "peft_config", lambda: iter(())), "config")
    assert extensions.names() == before


def test_extension_names_are_used_once() -> None:
    extensions.register(types.ModuleType("acme_empty"), "empty")
    with pytest.raises(MethodClashError, match="'empty' is registered already"):
        extensions.register(types.ModuleType("acme_other"), "empty")
    extensions.unregister("empty")
    with pytest.raises(MethodNotFoundError, match="'empty'"):
        extensions.unregister("empty")

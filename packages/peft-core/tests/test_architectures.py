"""The table of roles, and its extension by plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch import nn

from peft_core.architectures import (
    ARCHITECTURES,
    FUSED,
    architecture,
    default_targets,
    model_type_of,
    role_names,
)
from peft_core.config import TargetedConfig
from peft_core.errors import ConfigError
from peft_core.extensions import extensions
from peft_core.hookspecs import hookimpl
from peft_core.targets import select


class RolesConfig(TargetedConfig):
    peft_type: ClassVar[str] = "ROLES"
    default_roles: ClassVar[tuple[str, ...]] = ("query", "down")
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = {"opt": ("output",), "mt5": ()}


class Zoo:
    """An extension that knows one model type."""

    def __init__(self, **types: Any) -> None:
        self.types = types

    @hookimpl
    def peft_architectures(self) -> Any:
        return self.types


@pytest.fixture
def register() -> Iterator[Any]:
    names: list[str] = []

    def add(plugin: object, name: str) -> None:
        extensions.register(plugin, name)
        names.append(name)

    yield add
    for name in names:
        extensions.unregister(name)


def test_a_role_is_a_list_of_names() -> None:
    assert role_names("llama", ["query", "value"]) == ("q_proj", "v_proj")
    assert role_names("bert", ["dense"]) == ("dense",)
    assert role_names("blip-2", ["query"]) == ("q", "q_proj")
    assert role_names("llama", []) == ()


def test_a_fused_layer_stands_in_for_its_parts_once() -> None:
    assert role_names("gpt2", ["query", "key", "value", "down"]) == ("c_attn", "mlp.c_proj")
    assert role_names("phi3", ["gate", "up"]) == ("gate_up_proj",)


def test_a_type_or_role_that_is_not_known_has_no_default() -> None:
    assert role_names("unheard_of", ["query"]) is None
    assert role_names(None, ["query"]) is None
    assert role_names("llama", ["query", "receptance"]) is None
    assert architecture("unheard_of") is None


def test_defaults_come_from_the_class_and_its_exceptions() -> None:
    assert default_targets(RolesConfig, "llama") == ("q_proj", "down_proj")
    assert default_targets(RolesConfig, "opt") == ("out_proj",)
    assert default_targets(RolesConfig, "mt5") is None
    assert default_targets(TargetedConfig, "llama") is None
    assert default_targets(RolesConfig, None) is None


def test_the_model_type_of_configs_of_any_form() -> None:
    model = nn.Linear(1, 1)
    assert model_type_of(model) is None
    for config, expected in (
        ({"model_type": "a"}, "a"),
        (SimpleNamespace(model_type="b"), "b"),
        (3, None),
        ({}, None),
    ):
        model.config = config  # type: ignore[assignment]
        assert model_type_of(model) == expected


def test_every_entry_is_a_tuple_of_names() -> None:
    for model_type, roles in ARCHITECTURES.items():
        for role, names in roles.items():
            assert isinstance(names, tuple), (model_type, role)
            assert names, (model_type, role)
            assert all(isinstance(name, str) and name for name in names), (model_type, role)
        # A layer is either split or fused.
        assert not {part for part, fused in FUSED.items() if fused in roles} & roles.keys(), model_type


def test_an_extension_adds_model_types(register: Any) -> None:
    assert architecture("okapi") is None
    register(Zoo(okapi={"query": ["wq"], "down": ["w2", "w4"]}), "zoo")
    assert architecture("okapi") == {"query": ("wq",), "down": ("w2", "w4")}
    assert default_targets(RolesConfig, "okapi") == ("wq", "w2", "w4")
    model = nn.ModuleDict({"wq": nn.Linear(2, 2), "w4": nn.Linear(2, 2)})
    model.config = {"model_type": "okapi"}  # type: ignore[assignment]
    selection = select(model, RolesConfig())
    assert list(selection.matched) == ["wq", "w4"]
    assert selection.resolved == {"target_modules": ("wq", "w4")}
    assert architecture("llama") is not None


@pytest.mark.parametrize("taken", ["llama", "okapi"])
def test_a_model_type_given_twice_is_an_error_that_names_both(register: Any, taken: str) -> None:
    register(Zoo(okapi={"query": ["wq"]}), "zoo")
    register(Zoo(**{taken: {"query": ["wq"]}}), "menagerie")
    with pytest.raises(ConfigError) as caught:
        architecture("anything")
    first = "peft-core" if taken == "llama" else "'zoo'"
    for part in (repr(taken), first, "'menagerie'", "disable one"):
        assert part in str(caught.value)

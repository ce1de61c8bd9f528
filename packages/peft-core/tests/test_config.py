"""Configs: strict with users, careful with files, never changed, always writable."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from peft_core.config import AdapterConfig, TargetedConfig
from peft_core.errors import ConfigError, PeftError
from peft_core.plain_data import MAX_BYTES, MAX_DEPTH, MAX_ITEMS, parse_json


class ToyConfig(TargetedConfig):
    """A method's config with a field of every kind in use."""

    peft_type: ClassVar[str] = "TOY"
    inert_keys: ClassVar[Mapping[str, object]] = {"engine": "builtin", "cosmetic": ...}
    written_if_set: ClassVar[frozenset[str]] = frozenset({"ours"})

    r: int = 8
    alpha: float = 8.0
    bias: Literal["none", "all"] = "none"
    init: bool | Literal["gaussian"] = True
    ranks: dict[str, int] = Field(default_factory=dict)
    pairs: tuple[tuple[int, int], ...] | None = None
    tokens: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    ours: int = 0

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "rank" in data:
            data["r"] = data.pop("rank")
        return data


class NeedyConfig(ToyConfig):
    peft_type: ClassVar[str] = "NEEDY"
    size: int


class Colour(enum.Enum):
    ALL = "all"


@dataclass
class Ranks:
    q: int = 3


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ToyConfig(**fields)
    return str(caught.value)


# ---- what a user writes


def test_an_unknown_field_is_named_with_the_class_and_the_nearest_field() -> None:
    text = refusal(target_module=["q"])
    assert "target_module: ToyConfig has no such field" in text
    assert "Did you mean 'target_modules'?" in text


def test_all_problems_are_told_at_once_with_field_reason_and_value() -> None:
    text = refusal(r="8", bias="some", ranks={"a": "b"}, dtype=1, alpha=float("nan"), pairs=[[1, 2], [1]])
    for part in (
        "r: ",
        "'8', a str",
        "bias: ",
        "'none' or 'all'",
        "ranks: ",
        "dtype: ",
        "alpha: nan",
        "pairs: at [1]",
    ):
        assert part in text
    assert text.startswith("6 problems in ToyConfig")


def test_missing_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="size: this field is required"):
        NeedyConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "8"),
        ("r", True),
        ("r", 8.5),
        ("r", 1 << 70),
        ("r", torch.float16),
        ("r", np.zeros(3)),
        ("r", torch.empty((), device="meta")),
        ("alpha", float("inf")),
        ("alpha", np.float32("nan")),
        ("inference_mode", 1),
        ("inference_mode", "yes"),
        ("revision", 3),
        ("base_model_name_or_path", b"x"),
        ("base_model_name_or_path", "\ud800"),
        ("ranks", {1: 2}),
        ("ranks", object()),
        ("ranks", lambda: None),
        ("tokens", [1, "a"]),
        ("target_modules", [1]),
        ("target_modules", 5),
        ("target_modules", ""),
        ("target_modules", []),
        ("target_modules", [""]),
        ("exclude_modules", set()),
        ("layers_to_transform", -1),
        ("layers_to_transform", [True]),
        ("layers_to_transform", []),
        ("modules_to_save", "head"),
        ("modules_to_save", []),
        ("task_type", "CAUSAL"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_field(field: str, value: Any) -> None:
    assert f"{field}" in refusal(**{field: value})


def test_errors_are_the_librarys_own() -> None:
    config = ToyConfig()
    for act in (
        lambda: ToyConfig(nope=1),
        lambda: ToyConfig.model_validate({"r": "x"}),
        lambda: ToyConfig.model_validate(3),
        lambda: config.model_copy(update={"r": "x"}),
        lambda: config.resolve(nope=1),
        lambda: setattr(config, "r", 1),
        lambda: delattr(config, "r"),
        lambda: ToyConfig.from_dict({"r": "x"}),
        lambda: ToyConfig.from_dict([]),  # type: ignore[arg-type]
    ):
        with pytest.raises(PeftError) as caught:
            act()
        assert type(caught.value) is ConfigError


def test_task_types() -> None:
    assert ToyConfig(task_type="CAUSAL_LM").task_type == "CAUSAL_LM"
    assert "Did you mean 'CAUSAL_LM'?" in refusal(task_type="CAUSAL_ML")


def test_equal_forms_of_a_value_are_one() -> None:
    config = ToyConfig(
        target_modules={"v", "q"},
        exclude_modules=frozenset({"x"}),
        r=np.int64(4),
        alpha=np.float32(0.5),
        bias=Colour.ALL,
        ranks=Ranks(),
        pairs=[(1, 2)],
        tokens=np.int64(3).reshape(()) and [torch.tensor(3)],
        base_model_name_or_path=Path("a/b"),
    )
    assert config.target_modules == ("q", "v")  # A set has no order: sorted, so that files do not vary.
    assert config.exclude_modules == ("x",)
    assert (config.r, type(config.r)) == (4, int)
    assert (config.alpha, type(config.alpha)) == (0.5, float)
    assert config.bias == "all"
    assert config.ranks == {"q": 3}
    assert config.pairs == ((1, 2),)
    assert config.tokens == (3,)
    assert config.base_model_name_or_path == "a/b"
    assert ToyConfig(target_modules=["v", "q", "v"]).target_modules == ("v", "q")  # A list has one: kept.


def test_rules_of_the_selection_fields() -> None:
    assert "needs layers_to_transform" in refusal(layers_pattern="h")
    assert "regular expression" in refusal(target_modules="a.*", layers_to_transform=1)
    assert ToyConfig(target_modules="All-Linear", layers_to_transform=1).layers_to_transform == 1
    assert ToyConfig(layers_pattern=["h"], layers_to_transform=[2, 1]).layers_to_transform == (2, 1)


def test_a_class_may_allow_an_empty_target_list() -> None:
    class Elsewhere(ToyConfig):
        allow_no_targets: ClassVar[bool] = True

    assert Elsewhere(target_modules=[]).target_modules == ()


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert "containing itself" in refusal(tokens=loop)


def test_validators_that_would_break_lists_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match="mode='after'"):

        class Bad(AdapterConfig):
            peft_type: ClassVar[str] = "BAD"

            @model_validator(mode="before")
            @classmethod
            def _any(cls, data: Any) -> Any:
                return data


# ---- one object, never changed


def test_frozen_and_copied() -> None:
    ranks = {"a": 1}
    config = ToyConfig(ranks=ranks, target_modules=["q"])
    ranks["a"] = 2
    assert config.ranks == {"a": 1}
    with pytest.raises(ConfigError, match="frozen"):
        config.r = 2  # type: ignore[misc]
    changed = config.resolve(r=2, target_modules=("k",))
    assert (changed.r, config.r, config.target_modules) == (2, 8, ("q",))
    changed.ranks["b"] = 1
    assert config.ranks == {"a": 1}
    config.model_copy().ranks["b"] = 1
    assert config.ranks == {"a": 1}


def test_pickle_copy_hash() -> None:
    config = ToyConfig(ranks={"a": 1, "b": 2}, tokens={"x": [1]}, target_modules=["q"])
    for twin in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        copy.copy(config),
        config.resolve(),
    ):
        assert twin == config
        assert hash(twin) == hash(config)
        assert type(twin) is ToyConfig
    assert config.resolve(r=1) != config


# ---- files


def test_round_trip_through_a_directory(tmp_path: Path) -> None:
    config = ToyConfig(target_modules=["v", "q"], ranks={"b": 1, "a": 2}, task_type="CAUSAL_LM", pairs=[[1, 2]])
    path = config.save_pretrained(tmp_path / "new")
    assert path == tmp_path / "new" / "adapter_config.json"
    assert ToyConfig.from_pretrained(tmp_path / "new") == config
    data = json.loads(path.read_text())
    assert data["peft_type"] == "TOY"
    assert list(data) == sorted(data)
    # The first matching pattern counts, so their order is data and is not sorted.
    assert list(data["ranks"]) == ["b", "a"]
    assert list(ToyConfig.from_pretrained(path.parent).ranks) == ["b", "a"]


def test_fields_of_our_own_are_written_when_they_say_something() -> None:
    assert "ours" not in ToyConfig().to_dict()
    assert ToyConfig(ours=1).to_dict()["ours"] == 1
    assert ToyConfig().to_dict(inference_mode=True)["inference_mode"] is True
    assert ToyConfig().to_dict()["inference_mode"] is False


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
names = text | st.lists(text, max_size=3) | st.sets(text, max_size=3)
integers = st.integers(-(2**63), 2**63)
numbers = integers | st.floats()
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "target_modules": names,
    "exclude_modules": names,
    "modules_to_save": names,
    "layers_pattern": names,
    "layers_to_transform": st.integers(-1, 9) | st.lists(st.integers(-1, 9), max_size=3),
    "r": numbers,
    "alpha": numbers,
    "init": st.booleans() | st.just("gaussian"),
    "ranks": st.dictionaries(text, integers, max_size=3),
    "pairs": st.lists(st.lists(integers, min_size=1, max_size=3), max_size=2),
    "tokens": st.lists(integers, max_size=3) | st.dictionaries(text, st.lists(integers, max_size=3), max_size=3),
    "inference_mode": st.booleans(),
    "revision": text | integers,
}


# Building the table of all characters takes hypothesis a second, once; no example is slow.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in FIELDS.items()}))
def test_what_is_accepted_can_be_written_and_read_back(fields: dict[str, Any]) -> None:
    try:
        config = ToyConfig(**fields)
    except ConfigError:
        return
    content = config.to_json().encode()
    assert ToyConfig.from_dict(parse_json(content, source="text"), source="text") == config


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_is_switched_off_passes(value: Any) -> None:
    assert ToyConfig.from_dict({"use_magic": value}, source="f") == ToyConfig()


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "on", ["x"], {"a": None}])
def test_an_active_unknown_key_is_an_error_that_says_why(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ToyConfig.from_dict({"use_magic": value, "r": 4}, source="dir/adapter_config.json")
    text = str(caught.value)
    for part in ("dir/adapter_config.json", "'use_magic'", repr(value), "other numbers", "Install a version"):
        assert part in text


def test_inert_keys() -> None:
    harmless = {"peft_version": "0.1", "auto_mapping": {"a": "b"}, "runtime_config": {"x": True}}
    assert ToyConfig.from_dict({**harmless, "engine": "builtin", "cosmetic": [1]}, source="f") == ToyConfig()
    with pytest.raises(ConfigError, match="'engine'"):
        ToyConfig.from_dict({"engine": "other"}, source="f")


def test_a_number_is_not_the_inert_boolean() -> None:
    class Flag(ToyConfig):
        inert_keys: ClassVar[Mapping[str, object]] = {"flag": True}

    assert Flag.from_dict({"flag": True}, source="f").r == 8
    with pytest.raises(ConfigError, match="'flag'"):
        Flag.from_dict({"flag": 1}, source="f")


def test_a_method_may_translate_other_spellings() -> None:
    assert ToyConfig.from_dict({"rank": 3}, source="f").r == 3


def test_optional_selection_fields_may_be_switched_off_in_files() -> None:
    data = {"layers_pattern": "", "layers_to_transform": [], "exclude_modules": [], "modules_to_save": []}
    assert ToyConfig.from_dict(data, source="f") == ToyConfig()


def test_the_wrong_method_is_named() -> None:
    with pytest.raises(ConfigError, match=r"f: peft_type is 'OTHER', and ToyConfig reads 'TOY'"):
        ToyConfig.from_dict({"peft_type": "OTHER"}, source="f")


def test_values_from_files_are_shown_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        ToyConfig.from_dict({"x" * 10_000: "y" * 10_000, "r": "z" * 10_000}, source="f")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'"peft_type"', "not a JSON object"),
        (b'{"r": NaN}', "NaN is not a JSON value"),
        (b'{"alpha": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"alpha": 1e999}', "too large"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"r": 1, "r": 2}', "twice"),
        (b'{"ranks": {"a": 1, "a": 2}}', "twice"),
        (b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"r": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper"),
        (b'{"r": [' + b"1," * MAX_ITEMS + b"1]}", "a list of more than"),
        (b" " * (MAX_BYTES + 1), "larger than"),
        (b"{}", "no 'peft_type'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ToyConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        AdapterConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        ToyConfig.from_json_file(tmp_path)


def test_a_base_class_needs_a_method_name() -> None:
    for peft_type in (None, 3, ""):
        with pytest.raises(ConfigError, match="names the method"):
            AdapterConfig.from_dict({"peft_type": peft_type}, source="f")

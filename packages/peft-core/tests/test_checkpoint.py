"""Files of adapters: layout, what is written, what is read, what is refused."""

from __future__ import annotations

import json
import os
import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.corpus import CONFIG as GOOD_CONFIG
from hostile.corpus import Case, cases, good, packed, write
from hypothesis import given, settings
from hypothesis import strategies as st
from records_by_hand import HandConfig, HandPlugin, digest, digest_of_directory, digest_of_record, record
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_core import layout
from peft_core.adapter_file import AdapterFile, TensorsFile
from peft_core.adapter_names import check_name
from peft_core.checkpoint import read, save
from peft_core.errors import (
    AdapterNameError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    PeftError,
)
from peft_core.hookspecs import hookimpl
from peft_core.layers import SiteRequest
from peft_core.layout import collect
from peft_core.locating import CONFIG, WEIGHTS
from peft_core.matching import PREFIX, LoadReport, match

A0 = f"{PREFIX}layers.0.q_proj.lora_A.weight"
B0 = f"{PREFIX}layers.0.q_proj.lora_B.weight"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- names of adapters


@pytest.mark.parametrize(
    "name", ["default", "a", "1", "q_proj", "über-7", "日本", "two words", "x" * 128, "CONN", "base"]
)
def test_a_name_that_can_be_a_directory_is_accepted(name: str, tmp_path: Path) -> None:
    assert check_name(name) == name
    (tmp_path / name).mkdir()  # the property that the rule stands for


WRONG = [
    "",
    ".",
    "..",
    "a.b",
    "a/b",
    "/a",
    "a\\b",
    "C:",
    "a:b",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\u202eb",
    " a",
    "a ",
]
WRONG += [
    "x" * 129,
    "日" * 100,
    "\ud800",
    "__base__",
    "con",
    "NUL",
    "com1",
    "LPT9",
    "com¹",
    "a*b",
    "a?b",
    'a"b',
]


@pytest.mark.parametrize("name", [*WRONG, "a|b", "a<b", None, 3, b"a", ["a"]])
def test_a_name_that_cannot_is_refused_by_name(name: object) -> None:
    with pytest.raises(AdapterNameError) as caught:
        check_name(name)
    assert repr(name)[:50] in str(caught.value)


# ---- layout


def test_keys_are_those_of_the_layout() -> None:
    requests = [
        SiteRequest("layers.0.q"),
        SiteRequest(""),
        SiteRequest("m", part="in", key_prefix="in_proj."),
        SiteRequest("backbone", key_prefix="/"),
    ]
    shared = nn.Module()
    shared.register_parameter("bank", nn.Parameter(torch.ones(2)))
    shared.register_buffer("table", torch.ones(2))
    shared.register_buffer("cache", torch.ones(2), persistent=False)
    shared.inner = nn.Linear(2, 1)
    made = record(requests=requests, shared=shared)
    assert sorted(collect(made)) == sorted(
        [f"base_model.model.layers.0.q.lora_{x}.weight" for x in "AB"]
        + [f"base_model.model.lora_{x}.weight" for x in "AB"]
        + [f"base_model.model.m.in_proj.lora_{x}.weight" for x in "AB"]
        + [f"lora_{x}.weight" for x in "AB"]
        + ["base_model.bank", "base_model.table", "base_model.inner.weight", "base_model.inner.bias"]
    )
    assert collect(made)["base_model.bank"] is shared.bank
    slots = layout.layout(made)
    assert {key: slot.name for key, slot in slots.items() if slot.index == 2} == {
        f"{PREFIX}m.in_proj.lora_A.weight": "first",
        f"{PREFIX}m.in_proj.lora_B.weight": "second",
    }
    bias = slots["base_model.inner.bias"]
    assert bias.index is None and bias.name == "inner.bias" and bias.tensor is shared.inner.bias


def test_a_copied_module_keeps_its_own_names() -> None:
    made = record(requests=[SiteRequest("head", copied=True)])
    assert sorted(collect(made)) == [f"{PREFIX}head.first", f"{PREFIX}head.second"]


def test_two_slots_of_one_key_are_an_error_that_names_both() -> None:
    class Clashing(HandPlugin):
        keys = {"first": "w", "second": "w"}  # noqa: RUF012

    with pytest.raises(
        CheckpointError, match=r"'first' at layers\.0\.q_proj and 'second' at layers\.0\.q_proj.*'lora'"
    ):
        collect(record(plugin=Clashing()))
    with pytest.raises(CheckpointError, match=r"part 'b'.*key_prefix"):
        collect(record(requests=[SiteRequest("m", part="a"), SiteRequest("m", part="b")]))


# ---- writing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    made = record()
    for adapter in made.adapters:
        adapter.first.data = adapter.first.data.to(dtype)
    save(tmp_path / "a" / "b", made)
    with read(tmp_path / "a" / "b") as file:
        loaded = file.load(list(file.shapes))
    assert {key: value.dtype for key, value in loaded.items()} == {k: v.dtype for k, v in collect(made).items()}
    assert digest(made.config.to_dict(), loaded) == digest_of_record(made)


def test_integer_and_bool_buffers_come_back(tmp_path: Path) -> None:
    shared = nn.Module()
    values = {
        "i": torch.tensor([2**40, -1]),
        "b": torch.tensor([True, False, True]),
        "u": torch.tensor([0, 255], dtype=torch.uint8),
    }
    for name, value in values.items():
        shared.register_buffer(name, value)
    made = record(shared=shared)
    save(tmp_path, made)
    keys, report = match(read(tmp_path), collect(made))
    assert report.ok
    loaded = read(tmp_path).load(keys.values())
    assert all(torch.equal(loaded[f"base_model.{name}"], value) for name, value in values.items())


def test_the_files_are_what_other_readers_expect(tmp_path: Path) -> None:
    made = record()
    save(tmp_path, made, base_model_name_or_path="org/base")
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    text = (tmp_path / CONFIG).read_text()
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert text == json.dumps(data, indent=2) + "\n"
    assert data["peft_type"] == "LORA"
    assert data["inference_mode"] is True
    assert data["base_model_name_or_path"] == "org/base"
    assert made.config.base_model_name_or_path is None
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "peft_core.config": text, "peft_core.layout": "1"}
    assert set(load_file(tmp_path / WEIGHTS)) == set(collect(made))


def test_the_writer_is_named(tmp_path: Path) -> None:
    import dataclasses

    from peft_core.discovery import Source

    made = record()
    made.method = dataclasses.replace(made.method, source=Source("acme-method", "1.2"))
    save(tmp_path, made)
    assert read(tmp_path).wrote_by == "acme-method 1.2"
    assert read(tmp_path).method == "lora"
    save(tmp_path, record())
    assert read(tmp_path).wrote_by is None


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    save(tmp_path / "a", record())
    save(tmp_path / "b", record())
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_shared_and_strided_tensors_are_written_in_full(tmp_path: Path) -> None:
    made = record()
    one, two = made.adapters
    two.first = one.first  # one parameter at two sites
    wide = torch.arange(48.0).reshape(8, 6)
    one.second.data = wide[::2, ::3]
    two.second.data = wide[1::2, 1:3]  # parts of one storage
    save(tmp_path, made)
    assert digest_of_directory(tmp_path) == digest_of_record(made)
    assert (tmp_path / WEIGHTS).stat().st_size < 2000  # the views were cut out of their storage


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t.fill_(float("nan")), "NaN or infinity"),
        (lambda t: t.view(-1)[-1].fill_(float("-inf")), "NaN or infinity"),
        (lambda t: t.to("meta"), "meta device"),
        (lambda t: t.new_empty(0, 6), "no elements"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to(torch.float8_e5m2).fill_(float("inf")), "NaN or infinity"),
    ],
)
def test_what_cannot_be_right_is_not_written(spoil: Any, why: str, tmp_path: Path) -> None:
    save(tmp_path, record(0))
    before = snapshot(tmp_path)
    bad = record(1)
    bad.adapters[1].first = nn.Parameter(spoil(bad.adapters[1].first.detach().clone()))
    with pytest.raises(CheckpointError, match=why) as caught:
        save(tmp_path, bad)
    assert f"{PREFIX}layers.0.v_proj.lora_A.weight" in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_tensor_without_elements_is_written_where_the_method_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = record(0)
    kind = type(made.adapters[1])
    made.adapters[1].first = nn.Parameter(torch.empty(0, 6))
    monkeypatch.setattr(kind, "may_be_empty", True, raising=False)
    save(tmp_path, made)
    with read(tmp_path) as file:
        key = f"{PREFIX}layers.0.v_proj.lora_A.weight"
        assert file.shapes[key][0] == (0, 6)
        assert file.load([key])[key].shape == (0, 6)
    made.adapters[1].first = nn.Parameter(torch.empty(0))  # what a partitioned tensor looks like
    with pytest.raises(CheckpointError, match="no elements"):
        save(tmp_path, made)


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        save(tmp_path / "a", record(requests=[]))
    assert not (tmp_path / "a").exists()


def test_a_config_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    long = HandConfig(target_modules=[f"m{i}" * 10 for i in range(40_000)])
    with pytest.raises(ConfigError, match="larger than"):
        save(tmp_path / "a", record(config=long))
    assert not (tmp_path / "a").exists()


def test_links_are_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere", record(0))
    before = snapshot(tmp_path / "elsewhere")
    (tmp_path / "a").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "a" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert digest_of_directory(tmp_path / "a") == digest_of_record(record(0))  # reading goes through links
    save(tmp_path / "a", record(1))
    assert snapshot(tmp_path / "elsewhere") == before
    assert digest_of_directory(tmp_path / "a") == digest_of_record(record(1))
    assert not (tmp_path / "a" / WEIGHTS).is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        save(tmp_path, record())
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_file_in_the_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save(tmp_path / "a", record())
    assert (tmp_path / "a").read_text() == "mine"


# ---- config and weights belong together


def edit(directory: Path, **changes: Any) -> None:
    data = json.loads((directory / CONFIG).read_text())
    data.update(changes)
    (directory / CONFIG).write_text(json.dumps(data))


def test_inert_fields_may_be_edited(tmp_path: Path) -> None:
    save(tmp_path, record())
    edit(
        tmp_path,
        base_model_name_or_path="mine",
        revision="v2",
        inference_mode=False,
        task_type="CAUSAL_LM",
        peft_version="9",
        a_switched_off_option=None,
        another=[],
    )
    assert read(tmp_path).config["base_model_name_or_path"] == "mine"


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 16}, {"target_modules": ["k_proj"]}, {"peft_type": "OTHER"}, {"new": 1}, {"r": 0}],
)
def test_other_edits_are_refused_with_the_remedy(change: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, record())
    edit(tmp_path, **change)
    with pytest.raises(CheckpointError, match="do not belong together") as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "delete it" in str(caught.value)
    (tmp_path / CONFIG).unlink()
    assert digest_of_directory(tmp_path) == digest_of_record(record())


def test_weights_of_another_adapter_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", record())
    save(tmp_path / "b", record(config=HandConfig(target_modules=["q_proj", "v_proj"], lora_alpha=64)))
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "b" / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        read(tmp_path / "a")


def test_files_of_other_writers_have_no_copy_of_the_config(tmp_path: Path) -> None:
    write(Case("", "", "", packed(good(), {"format": "pt"}), json.dumps(GOOD_CONFIG).encode()), tmp_path)
    file = read(tmp_path)
    assert (file.config, file.wrote_by, file.method) == (GOOD_CONFIG, None, "lora")
    (tmp_path / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"no {CONFIG}"):
        read(tmp_path)


def test_a_newer_layout_is_refused(tmp_path: Path) -> None:
    write(
        Case("", "", "", packed(good(), {"peft_core.layout": "2"}), json.dumps(GOOD_CONFIG).encode()),
        tmp_path,
    )
    with pytest.raises(CheckpointError, match=r"layout '2'.*pip install -U peft-core"):
        read(tmp_path)


# ---- finding


def test_one_file_alone_is_an_adapter(tmp_path: Path) -> None:
    save(tmp_path, record())
    (tmp_path / WEIGHTS).rename(tmp_path / "mine.safetensors")
    (tmp_path / CONFIG).unlink()
    file = read(tmp_path / "mine.safetensors")
    assert file.method == "lora"
    assert digest(file.config, file.load(file.shapes)) == digest_of_record(record())


def test_a_file_of_another_writer_needs_its_config(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(packed(good()))
    with pytest.raises(CheckpointError, match="holds no config"):
        read(tmp_path / "x.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps(GOOD_CONFIG))
    assert read(tmp_path / "x.safetensors").config == GOOD_CONFIG


def test_subfolders(tmp_path: Path) -> None:
    save(tmp_path / "other", record())
    assert digest(read(tmp_path, subfolder="other").config, read(tmp_path, subfolder="other").load([A0]))
    with pytest.raises(CheckpointError, match=r"no adapter.*subfolder: other"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such sub-folder.*: other"):
        read(tmp_path, subfolder="otter")
    for outside in ("..", "../x", "/etc", "a/../..", "", "a\\..\\b", "C:x"):
        with pytest.raises(CheckpointError, match="cannot be a subfolder"):
            read(tmp_path / "other", subfolder=outside)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "exploded").touch, ())

    (tmp_path / CONFIG).write_text(json.dumps(GOOD_CONFIG))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    for source in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin: a pickle.*weights_only=True.*safetensors"):
            read(source)
    assert not (tmp_path / "exploded").exists()


def test_the_remedy_for_a_pickle_works(tmp_path: Path) -> None:
    import re
    import subprocess

    torch.save(collect(record()), tmp_path / "adapter_model.bin")
    (tmp_path / CONFIG).write_text(json.dumps(record().config.to_dict()))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    code = re.search(r'python -c "(.*)"', str(caught.value))
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, check=True)
    assert digest_of_directory(tmp_path) == digest_of_record(record())


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a mistyped path must not ask a network")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=never))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for source in (
        tmp_path / "no",
        "no",
        "./a/b",
        "/a/b/c",
        "a/b/c",
        "out/adaptor",
        "../a",
        Path("a/b"),
        "",
        "a\0b",
    ):
        with pytest.raises(CheckpointError):
            read(source)
    with pytest.raises(CheckpointError, match="not a path"):
        read(None)  # type: ignore[arg-type]


def test_the_hub_is_asked_for_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path / "cache")

    save(tmp_path / "cache", record())
    save(tmp_path / "cache" / "sub", record(1))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    monkeypatch.chdir(tmp_path)
    assert read("org/name", revision="v1").source == str(tmp_path / "cache" / WEIGHTS)
    read("org/name", subfolder="sub")
    assert asked == [
        ("org/name", {"revision": "v1", "allow_patterns": [CONFIG, WEIGHTS]}),
        ("org/name", {"revision": None, "allow_patterns": [f"sub/{CONFIG}", f"sub/{WEIGHTS}"]}),
    ]


def test_the_hub_out_of_reach_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, **options: Any) -> str:
        raise RuntimeError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    with pytest.raises(CheckpointError, match=r"'org/name'.*no such directory.*no route.*local directory"):
        read("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"'org/name'.*pip install huggingface_hub"):
        read("org/name")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError):
        read(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        AdapterFile(tmp_path / WEIGHTS)


# ---- reading


def test_an_open_file_is_one_checkpoint_whatever_is_saved_meanwhile(tmp_path: Path) -> None:
    save(tmp_path, record(0))
    file = read(tmp_path)
    save(tmp_path, record(1))
    assert digest(file.config, file.load(file.shapes)) == digest_of_record(record(0))


def test_a_file_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, record())
    file = read(tmp_path)
    os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size - 4)
    with pytest.raises(CheckpointError, match="4 bytes early"):
        file.load(file.shapes)


def test_a_closed_file_is_an_error_and_descriptors_are_given_back(tmp_path: Path) -> None:
    save(tmp_path, record())
    with read(tmp_path) as file:
        pass
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.load([A0])
    if Path("/proc/self/fd").exists():
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            read(tmp_path)
            (tmp_path / "bad").mkdir(exist_ok=True)
            with pytest.raises(CheckpointError):
                read(tmp_path / "bad")
            with pytest.raises(CheckpointMismatchError):
                read(tmp_path).load(["none"])
        assert len(os.listdir("/proc/self/fd")) == before


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, record())
    file = read(tmp_path)
    sizes: list[int] = []
    original = AdapterFile._fill
    monkeypatch.setattr(
        AdapterFile, "_fill", lambda self, memory, at: sizes.append(len(memory)) or original(self, memory, at)
    )
    assert list(file.load([A0])) == [A0]
    assert sizes == [2 * 6 * 4]


def test_tensors_in_memory_are_a_checkpoint_too() -> None:
    made = record()
    file = TensorsFile(made.config.to_dict(), collect(made), "converted")
    assert match(file, collect(made))[1].ok
    assert digest(file.config, file.load(file.shapes)) == digest_of_record(made)
    with pytest.raises(CheckpointMismatchError, match=r"converted.*NaN"):
        TensorsFile({}, {"x": torch.tensor([float("nan")])}, "converted").load(["x"])


# ---- the hostile corpus


def load_as_a_model_would(directory: Path) -> dict[str, torch.Tensor]:
    with read(directory) as file:
        config = HandConfig.from_dict(file.config, source=str(directory / CONFIG))
        keys, _ = match(file, collect(record(config=config)))
        return file.load(keys.values())


def test_the_corpus_starts_from_a_good_file(tmp_path: Path) -> None:
    write(Case("", "", "", packed(good()), json.dumps(GOOD_CONFIG).encode()), tmp_path)
    assert len(load_as_a_model_would(tmp_path)) == 4


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_hostile_files_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    directory = write(case, tmp_path / "adapter")
    wanted = {
        "read": (CheckpointError, ConfigError),
        "config": ConfigError,
        "match": CheckpointMismatchError,
        "load": CheckpointMismatchError,
    }
    before = snapshot(directory)
    with pytest.raises(wanted[case.stage]) as caught:  # type: ignore[arg-type]
        load_as_a_model_would(directory)
    message = str(caught.value)
    assert case.names in message
    assert "adapter" in message  # the path
    assert len(message) < 5000
    assert all(character.isprintable() or character == "\n" for character in message)
    stage = "read"
    try:
        file = read(directory)
        stage = "config"
        HandConfig.from_dict(file.config)
        stage = "match"
        keys, _ = match(file, collect(record()))
        stage = "load"
        file.load(keys.values())
    except PeftError:
        pass
    assert stage == case.stage
    assert snapshot(directory) == before


WHOLE = packed(good(), {"format": "pt"})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(WHOLE)),
)
def test_any_damage_gives_an_error_of_ours_or_finite_tensors(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    if length % 3 == 0:
        del content[length:]
    directory = tmp_path_factory.mktemp("damage")
    write(Case("", "", "", bytes(content), json.dumps(GOOD_CONFIG).encode()), directory)
    try:
        loaded = load_as_a_model_would(directory)
    except PeftError:
        return
    assert sorted(loaded) == sorted(good())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.values())


# ---- matching


def in_memory(tensors: dict[str, torch.Tensor]) -> TensorsFile:
    return TensorsFile({"peft_type": "LORA"}, tensors, "the file")


def test_keys_with_and_without_prefix_are_the_same() -> None:
    expected = collect(record())
    for stripped in (False, True):
        file = in_memory({k.removeprefix(PREFIX) if stripped else k: v for k, v in expected.items()})
        keys, report = match(file, expected)
        assert report == LoadReport()
        assert list(keys) == list(expected)
        assert all(theirs == (mine.removeprefix(PREFIX) if stripped else mine) for mine, theirs in keys.items())


def test_shared_and_absolute_keys_match_in_other_spellings() -> None:
    one = torch.ones(1)
    assert match(in_memory({"bank": one}), {"base_model.bank": one})[0] == {"base_model.bank": "bank"}
    assert match(in_memory({f"{PREFIX}p": one}), {"p": one})[0] == {"p": f"{PREFIX}p"}


def test_a_model_whose_paths_look_like_the_prefix() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    expected = {f"{PREFIX}x": one, f"{PREFIX}{PREFIX}x": two}
    assert match(in_memory(dict(expected)), expected)[0] == {key: key for key in expected}
    # Without prefix "base_model.model.x" is an exact name as well: what cannot be told apart is refused.
    with pytest.raises(CheckpointMismatchError):
        match(in_memory({"x": one, f"{PREFIX}x": two}), expected)


def test_names_are_compared_whole() -> None:
    tensor = torch.ones(1)
    expected = {f"{PREFIX}layers.1.a": tensor}
    for other in ("layers.11.a", "layers.1.a.a", "a", "ayers.1.a", "1.a", f"x.{PREFIX}layers.1.a"):
        with pytest.raises(CheckpointMismatchError):
            match(in_memory({other: tensor}), expected)


def test_all_problems_are_reported_at_once() -> None:
    expected = collect(record())
    tensors = dict(expected)
    tensors.pop(A0)
    tensors[B0] = torch.ones(3, 3)
    tensors["stranger"] = torch.ones(1)
    tensors[f"{PREFIX}layers.0.v_proj.lora_A.weight"] = torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(CheckpointMismatchError) as caught:
        match(in_memory(tensors), expected)
    for text in (
        A0,
        B0,
        "(3, 3)",
        "(4, 2)",
        "stranger",
        "v_proj.lora_A.weight",
        "I64",
        "the file",
        "strict=False",
    ):
        assert text in str(caught.value)
    keys, report = match(in_memory(tensors), expected, strict=False)
    assert report.missing == (A0,)
    assert report.unexpected == ("stranger",)
    assert set(report.mismatched) == {B0, f"{PREFIX}layers.0.v_proj.lora_A.weight"}
    assert not report.ok
    assert list(keys) == [f"{PREFIX}layers.0.v_proj.lora_B.weight"]


def test_conversions_are_reported() -> None:
    half = {k: v.detach().half() for k, v in collect(record()).items()}
    keys, report = match(in_memory(half), collect(record()))
    assert report.ok
    assert len(keys) == 4
    assert report.converted[A0] == "F16 -> float32"
    whole = {"n": torch.ones(1, dtype=torch.int32)}
    with pytest.raises(CheckpointMismatchError, match="I32"):
        match(in_memory(whole), {"n": torch.ones(1, dtype=torch.int64)})


def test_a_rename_of_all_is_recognised() -> None:
    expected = collect(record())
    moved = {key.replace("model.layers", "model.model.layers"): value for key, value in expected.items()}
    with pytest.raises(
        CheckpointMismatchError,
        match=r"All 4 missing.*'base_model\.model\.model\.layers.*'base_model\.model\.layers",
    ):
        match(in_memory(moved), expected)
    moved.popitem()
    with pytest.raises(CheckpointMismatchError) as caught:
        match(in_memory(moved), expected)
    assert "All" not in str(caught.value)


def test_a_near_name_is_suggested() -> None:
    expected = collect(record())
    tensors = {key.replace("lora_A", "lora_a") if key == A0 else key: value for key, value in expected.items()}
    with pytest.raises(CheckpointMismatchError, match=r"lora_A\.weight' Did you mean 'base_model.*lora_a\.weight'"):
        match(in_memory(tensors), expected)


def test_base_weights_are_reported_apart() -> None:
    expected = collect(record())
    extra = {
        f"{PREFIX}embed.base_layer.weight": torch.ones(2),
        f"{PREFIX}layers.0.q_proj.base_layer.bias": torch.ones(2),
        f"{PREFIX}head.weight": torch.ones(2),
    }
    file = in_memory({**expected, **extra})
    with pytest.raises(CheckpointMismatchError, match=r"1 unexpected:\n  'base_model.model.head.weight'"):
        match(file, expected)
    named = ["embed.weight", "layers.0.q_proj.bias", "head.weight"]
    keys, report = match(file, expected, base_names=named)
    assert report.base_weights == dict(zip(named, extra, strict=True))
    assert report.ok
    assert set(keys) == set(expected)
    # With the base's names at hand nothing else passes as one.
    with pytest.raises(CheckpointMismatchError, match=r"embed\.base_layer\.weight"):
        match(file, expected, base_names=["head.weight", "layers.0.q_proj.bias"])
    # An adapter's own tensor inside a wrapped layer is not a base weight.
    inner = in_memory({**expected, f"{PREFIX}m.base_layer.out.lora_A.weight": torch.ones(1)})
    with pytest.raises(CheckpointMismatchError, match=r"out.lora_A"):
        match(inner, expected)


def test_a_long_list_of_problems_stays_readable() -> None:
    many = {f"k{i}" * 200: torch.ones(1) for i in range(1000)}
    with pytest.raises(CheckpointMismatchError) as caught:
        match(in_memory(many), collect(record()))
    assert "1000 unexpected" in str(caught.value)
    assert "and 800 more" in str(caught.value)
    assert len(str(caught.value)) < 100_000
    assert len(match(in_memory(many), collect(record()), strict=False)[1].unexpected) == 1000


def test_the_state_key_hook_is_asked_once_per_slot() -> None:
    calls: list[str] = []

    class Counting(HandPlugin):
        @hookimpl
        def peft_state_key(self, key: str) -> str:
            calls.append(key)
            return self.keys[key]

    collect(record(plugin=Counting(), paths=tuple(f"layers.{i}.q_proj" for i in range(20))))
    assert sorted(calls) == ["first", "second"]


# ---- the other library


@pytest.fixture
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return lambda: (torch.manual_seed(0), transformers.LlamaForCausalLM(config).eval())[1]


def low_rank(model: nn.Module, seed: int = 3) -> Any:
    paths = tuple(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj"))

    def sizes(path: str) -> tuple[int, int]:
        layer = model.get_submodule(path)
        return layer.in_features, layer.out_features

    config = HandConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=6)
    return record(seed, paths=paths, config=config, sizes=sizes)


@pytest.mark.filterwarnings("ignore")  # the other library's
def test_a_directory_of_ours_loads_in_hf_peft(llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.arange(8)[None]
    base = llama()
    made = low_rank(base)
    save(tmp_path, made, base_model_name_or_path="a/b")
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    got = theirs.eval()(ids).logits
    for request, adapter in zip(made.requests, made.adapters, strict=True):
        weight = base.get_submodule(request.path).weight
        weight.data += (6 / 2) * adapter.second.data @ adapter.first.data
    want = base(ids).logits
    # The same sum in another order, in float32.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (llama()(ids).logits - want).abs().max() > 0.01  # the adapter does something


@pytest.mark.filterwarnings("ignore")  # the other library's
def test_a_directory_of_hf_peft_is_read(llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    theirs.save_pretrained(str(tmp_path))
    with read(tmp_path) as file:
        assert (file.method, file.wrote_by, file.config["lora_alpha"]) == ("lora", None, 6)
        expected = collect(low_rank(llama()))
        keys, report = match(file, expected)
        loaded = file.load(keys.values())
    assert report.ok
    assert not report.converted
    state = peft.get_peft_model_state_dict(theirs)
    assert set(keys.values()) == set(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_files_of_the_reference_writer_read_the_same(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.tensor(7),
        "d": torch.ones(2, 0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with AdapterFile(tmp_path / "x.safetensors") as file:
        loaded = file.load(tensors)
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())

"""Hostile adapter directories: what damage, mistakes and attackers make of a good one.

Run as a script to write them all below a directory, for a look or for another reader:
`python corpus.py DIRECTORY`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "base_model.model."
SITES = ("layers.0.q_proj", "layers.0.v_proj")
SHAPES = {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 2,
    "target_modules": ["q_proj", "v_proj"],
}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def good() -> Tensors:
    """Key -> (dtype, shape, data) of a checkpoint without fault."""
    found: Tensors = {}
    for site in SITES:
        for slot, shape in SHAPES.items():
            count = shape[0] * shape[1]
            found[f"{PREFIX}{site}.{slot}"] = ("F32", shape, struct.pack(f"<{count}f", *([0.5] * count)))
    return found


def packed(tensors: Tensors, metadata: Any = None) -> bytes:
    """A safetensors file, by hand: the library would refuse to write most of these."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for key, (dtype, shape, content) in tensors.items():
        header[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@dataclass(frozen=True)
class Case:
    """One directory. `stage` says where it must be refused: "read", "config", "match" or "load"; `names` is
    what the message must say."""

    name: str
    stage: str
    names: str
    weights: bytes
    config: bytes


KEY = f"{PREFIX}{SITES[0]}.lora_A.weight"


def cases() -> list[Case]:
    config = json.dumps(CONFIG).encode()
    whole = packed(good())
    length = struct.unpack("<Q", whole[:8])[0]
    found: list[Case] = []

    def weights(name: str, stage: str, names: str, content: bytes) -> None:
        found.append(Case(name, stage, names, content, config))

    def configs(name: str, names: str, content: bytes, stage: str = "read") -> None:
        found.append(Case(name, stage, names, whole, content))

    def changed(name: str, stage: str, names: str, change: Callable[[Tensors], object]) -> None:
        tensors = good()
        change(tensors)
        weights(name, stage, names, packed(tensors))

    def entry(name: str, names: str, **fields: Any) -> None:
        usual = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = json.dumps({"x": {k: v for k, v in {**usual, **fields}.items() if v is not ...}}).encode()
        weights(name, "read", names, with_header(header, b"\0" * 4))

    # The file as such.
    weights("empty", "read", "header", b"")
    weights("seven_bytes", "read", "header", b"\x01\0\0\0\0\0\0")
    weights("header_cut_short", "read", f"header should have {length}", whole[: 8 + length // 2])
    weights("data_cut_short", "read", "tensors take", whole[:-1])
    weights("data_too_long", "read", "tensors take", whole + b"\0")
    weights("header_length_huge", "read", str(2**63), struct.pack("<Q", 2**63) + whole[8:])
    weights("header_length_all_ones", "read", str(2**64 - 1), struct.pack("<Q", 2**64 - 1) + whole[8:])
    weights("pickle_renamed", "read", "header", b"\x80\x02}q\x00." * 9)
    # The header's JSON.
    weights("header_not_json", "read", "not valid JSON", with_header(b"{nonsense"))
    weights("header_not_utf8", "read", "not valid JSON", with_header(b'{"\xff\xfe": 1}'))
    weights("header_list", "read", "not a JSON object", with_header(b"[]"))
    weights("header_deep", "read", "not valid JSON", with_header(b'{"a":' * 100_000))
    weights("header_deep_lists", "read", "not valid JSON", with_header(b"[" * 200_000))
    weights("header_nan", "read", "NaN", with_header(b'{"a": NaN}'))
    weights("header_long_integer", "read", "not valid JSON", with_header(b'{"a": ' + b"9" * 5000 + b"}"))
    twice = b'"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    weights("header_key_twice", "read", "'x' twice", with_header(b"{" + twice + b"," + twice + b"}", b"\0" * 4))
    inner = b'{"x": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}'
    weights("header_inner_key_twice", "read", "'dtype' twice", with_header(inner, b"\0" * 4))
    weights("metadata_not_strings", "read", "__metadata__", packed(good(), {"a": 1}))
    weights("metadata_list", "read", "__metadata__", packed(good(), ["a"]))
    # Entries.
    entry("entry_without_dtype", "'x'", dtype=...)
    entry("entry_dtype_number", "'x'", dtype=3)
    entry("entry_shape_negative", "'x'", shape=[-1])
    entry("entry_shape_bool", "'x'", shape=[True])
    entry("entry_shape_float", "'x'", shape=[1.0])
    entry("entry_shape_too_large", "'x'", shape=[2**62, 2**62])
    entry("entry_shape_many_dims", "'x'", shape=[1] * 100_000)
    entry("entry_offsets_reversed", "'x'", data_offsets=[4, 0])
    entry("entry_offsets_outside", "tensors take", shape=[2], data_offsets=[0, 8])
    entry("entry_offsets_three", "'x'", data_offsets=[0, 2, 4])
    entry("entry_offsets_hole", "'x'", shape=[0], data_offsets=[4, 4])
    overlap = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    weights(
        "entries_overlap",
        "read",
        "'y'",
        with_header(json.dumps({"x": overlap, "y": overlap}).encode(), b"\0" * 4),
    )
    weights("entry_is_a_list", "read", "'x'", with_header(b'{"x": []}'))
    # The tensors.
    one = ("F32", (1,), b"\0" * 4)
    changed("tensor_absolute_name", "match", "'/etc/passwd'", lambda t: t.update({"/etc/passwd": one}))
    changed("tensor_dots_name", "match", "../../x", lambda t: t.update({"../../x": one}))
    changed("tensor_control_name", "match", "a\\x1b[31mb", lambda t: t.update({"a\x1b[31mb": one}))
    changed(
        "tensor_extra",
        "match",
        "layers.1.q_proj",
        lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_A.weight": one}),
    )
    changed(
        "tensor_of_the_base",
        "match",
        "layers.0.q_proj.weight",
        lambda t: t.update({f"{PREFIX}layers.0.q_proj.weight": one}),
    )
    changed("tensor_missing", "match", KEY, lambda t: t.pop(KEY))
    changed("tensor_renamed", "match", KEY, lambda t: t.update({KEY.replace("lora_A", "lora_a"): t.pop(KEY)}))
    changed("tensor_transposed", "match", "(6, 2)", lambda t: t.update({KEY: ("F32", (6, 2), t[KEY][2])}))
    changed("tensor_scalar", "match", "()", lambda t: t.update({KEY: ("F32", (), b"\0" * 4)}))
    changed("tensor_integers", "match", "I32", lambda t: t.update({KEY: ("I32", (2, 6), t[KEY][2])}))
    changed("tensor_unknown_dtype", "match", "C64", lambda t: t.update({KEY: ("C64", (2, 6), b"\0" * 96)}))
    changed(
        "tensor_twice_by_prefix",
        "match",
        KEY.removeprefix(PREFIX),
        lambda t: t.update({KEY.removeprefix(PREFIX): t[KEY]}),
    )
    weights("no_tensors", "match", KEY, packed({}))
    for what, value in (("nan", float("nan")), ("inf", float("inf")), ("minus_inf", float("-inf"))):
        bad = struct.pack("<12f", *([0.5] * 11), value)
        changed(f"tensor_{what}", "load", KEY, lambda t, bad=bad: t.update({KEY: ("F32", (2, 6), bad)}))
    changed("tensor_half_inf", "load", KEY, lambda t: t.update({KEY: ("F16", (2, 6), b"\x00\x7c" * 12)}))
    changed("tensor_fp8_nan", "load", KEY, lambda t: t.update({KEY: ("F8_E4M3", (2, 6), b"\x7f" * 12)}))
    # The config.
    configs("config_empty", "not valid JSON", b"")
    configs("config_list", "not a JSON object", b"[]")
    configs("config_nan", "NaN", b'{"peft_type": "LORA", "r": NaN}')
    configs("config_deep", "nested deeper", b'{"peft_type": "LORA", "a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    configs("config_key_twice", "'r' appears twice", b'{"peft_type": "LORA", "r": 2, "r": 3}')
    configs("config_large", "larger than", b'{"peft_type": "LORA", "a": "' + b"x" * (1 << 20) + b'"}')
    configs("config_without_method", "peft_type is None", b'{"r": 2}')
    configs("config_method_number", "peft_type is 3", b'{"peft_type": 3}')
    configs("config_method_empty", "peft_type is ''", b'{"peft_type": ""}')
    configs("config_active_unknown", "use_magic", json.dumps({**CONFIG, "use_magic": True}).encode(), "config")
    configs("config_imports", "auto_import", json.dumps({**CONFIG, "auto_import": "os"}).encode(), "config")
    configs("config_rank_string", "r:", json.dumps({**CONFIG, "r": "2"}).encode(), "config")
    return found


def write(case: Case, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(case.weights)
    (directory / "adapter_config.json").write_bytes(case.config)
    return directory


if __name__ == "__main__":
    for made in cases():
        write(made, Path(sys.argv[1]) / made.name)

"""Plain JSON data: what a config holds, read from files within limits, and shown in messages."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping, Set
from typing import Any

from pydantic import BaseModel

from .errors import ConfigError
from .suggest import shown

# Limits on a config file. The largest known ones, with all target paths of large models, have some 100 kB.
MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_ITEMS = 1 << 16


def dump_json(data: Mapping[str, Any]) -> str:
    """Return JSON text with sorted keys. Only the top level is sorted: in a mapping of patterns the first hit
    counts, so the order of its keys is data. Raises `ValueError` for what JSON cannot hold."""
    ordered = {key: data[key] for key in sorted(data)}
    return json.dumps(ordered, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file of unknown origin. Raises `ConfigError`, naming the file.

    Refused: more than `MAX_BYTES`, nesting beyond `MAX_DEPTH`, containers of more than `MAX_ITEMS` entries,
    repeated keys (readers disagree about which one counts), NaN and infinities, and anything but an object.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: cannot be read: {error}") from error
    return parse_json(content, source=os.fspath(path))


def parse_json(content: bytes, *, source: str) -> dict[str, Any]:
    """Parse the bytes of a JSON object under the limits of `read_json`; `source` names them in errors."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES} bytes; no adapter config is.")

    def refuse(what: str) -> Any:
        raise ConfigError(f"{source}: {what}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                refuse(f"the key {shown(key)} appears twice in one object")
            found[key] = value
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse(f"the number {shown(text)} is too large")
        return value

    try:
        data = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=lambda text: refuse(f"{text} is not a JSON value"),
            parse_float=number,
        )
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{source}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # Malformed JSON, malformed UTF-8, or an integer of thousands of digits.
        raise ConfigError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: the file holds {shown(data)}, not a JSON object")
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        if any(len(container) > MAX_ITEMS for container in level):
            raise ConfigError(f"{source}: a list of more than {MAX_ITEMS} entries")
        inner = (value for item in level for value in (item.values() if isinstance(item, dict) else item))
        level = [value for value in inner if isinstance(value, (dict, list))]
        if not level:
            return data
    raise ConfigError(f"{source}: nested deeper than {MAX_DEPTH} levels")


class NotPlainError(ValueError):
    """A value has no JSON form."""


def to_plain(value: Any, where: str, depth: int = 0) -> Any:
    """Return `value` as JSON data: sets as sorted lists, NumPy scalars as Python's, enums as their values."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise NotPlainError(f"{where}: {shown(value)} holds half a surrogate pair; no file can") from None
        return str(value)
    if isinstance(value, int):
        if abs(value) >= 1 << 63:
            raise NotPlainError(f"{where}: {shown(value)} does not fit 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotPlainError(f"{where}: {float(value)} is not a finite number")
        return float(value)
    if isinstance(value, os.PathLike):
        return to_plain(os.fspath(value), where, depth)
    if depth >= MAX_DEPTH:
        raise NotPlainError(f"{where}: nested deeper than {MAX_DEPTH} levels, or containing itself")
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotPlainError(f"{where}: the key {shown(key)} is not a string")
        return {str(key): to_plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (Set, list, tuple)):
        items = [to_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return sorted(items, key=lambda item: (str(type(item)), item)) if isinstance(value, Set) else items
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        try:
            scalar = value.item()
        except (RuntimeError, TypeError, ValueError):  # A tensor without data.
            scalar = None
        if isinstance(scalar, (bool, int, float, str)):
            return to_plain(scalar, where, depth)
    raise NotPlainError(
        f"{where}: {shown(value)} is a {type_name(value)}, which a config file cannot hold; "
        "give a string, a number, a boolean, or lists and mappings of these"
    )


def type_name(value: object) -> str:
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozenset((key, hashable(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(hashable(item) for item in value)
    return value

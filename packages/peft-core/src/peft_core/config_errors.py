"""What is wrong with a config, in words that a user of it knows."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from pydantic import BaseModel, ValidationError

from .plain_data import type_name
from .suggest import did_you_mean, shown


def readable(cls: type[BaseModel], error: ValidationError, skip: Set[str]) -> Iterable[str]:
    """One line for each field with a problem: where, what, and what was given."""
    by_field: dict[str, tuple[list[str], Any]] = {}
    for item in error.errors(include_url=False):
        loc = item["loc"]
        field = str(loc[0]) if loc else "the config as a whole"
        if field in skip:
            continue
        if item["type"] == "extra_forbidden":
            message = f"{cls.__name__} has no such field.{did_you_mean(field, cls.model_fields)}"
        elif item["type"] == "missing":
            message = "this field is required"
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
        # A union reports each of its members; their names in `loc` say nothing to a reader, positions do.
        inner = "".join(f"[{part!r}]" for part in loc[1:] if isinstance(part, int) or _is_key(item, part))
        messages, _ = by_field.setdefault(field, ([], item.get("input")))
        text = f"at {inner}: {message}" if inner else message
        if text not in messages:
            messages.append(text)
    for field, (messages, given) in by_field.items():
        line = f"{field}: {', or '.join(messages)}"
        plain = field in cls.model_fields and not messages[0].startswith("this field is required")
        yield line + (f" (got {shown(given)}, a {type_name(given)})" if plain else "")


def _is_key(item: Any, part: str | int) -> bool:
    """Whether a string in an error's location is a key of the data, not the name of a union's member."""
    return isinstance(part, str) and item["type"] in ("extra_forbidden", "missing")

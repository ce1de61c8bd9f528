"""What may be the name of an adapter."""

from __future__ import annotations

import re

from .errors import AdapterNameError
from .suggest import shown


def check_name(name: object) -> str:
    """Return an adapter's name if it is one: it becomes the name of a directory, on any system.

    Raises `AdapterNameError`.
    """
    why = _what_is_wrong(name)
    if why:
        raise AdapterNameError(
            f"{shown(name, 300)} cannot be the name of an adapter: {why}. A name is one part of a path: letters, "
            "digits, '_' and '-', up to 128 of them."
        )
    return str(name)


def _what_is_wrong(name: object) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not a string"
    if not name:
        return "it is empty"
    if len(name) > 128 or len(name.encode("utf-8", "replace")) > 255:
        return "it is too long"
    bad = sorted({character for character in name if character in './\\:<>"|?*' or not character.isprintable()})
    if bad:
        return f"it has {', '.join(map(repr, bad))} in it"
    if name != name.strip():
        return "it starts or ends with a space"
    if name == "__base__":
        return "that stands for the base model without adapters"
    if re.fullmatch(r"(?i)con|prn|aux|nul|(com|lpt)[0-9¹²³]", name):
        return "Windows keeps it for a device"
    return None

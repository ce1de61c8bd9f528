"""Which tensor of a file is which tensor of an adapter: all of them, by whole names, before any change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .adapter_file import DTYPES, SUPPORTED, AdapterFile, named
from .errors import CheckpointMismatchError
from .suggest import did_you_mean

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."

# Of each kind of problem; a report has them all.
_LISTED = 200
_SUGGESTED = 10


@dataclass(frozen=True)
class LoadReport:
    """How a file fits an adapter.

    Keys are the adapter's in `missing`, `mismatched` and `converted`, the file's elsewhere.

    Attributes:
        missing: expected and not in the file.
        unexpected: in the file and of no use.
        mismatched: there, but of another shape or of an unusable dtype -> what is wrong.
        base_weights: name of a parameter of the base model -> the file's key of a whole copy of it. Other
            writers put them next to adapters; they are no part of the adapter.
        converted: tensors that change their dtype when they are loaded -> "F16 -> float32".
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)
    base_weights: Mapping[str, str] = field(default_factory=dict)
    converted: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the file fits exactly; base weights and conversions do not count against it."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def missing_keys(self) -> list[str]:
        """`missing`, as `torch.nn.Module.load_state_dict` calls it."""
        return list(self.missing)

    @property
    def unexpected_keys(self) -> list[str]:
        """`unexpected`, likewise."""
        return list(self.unexpected)


def match(
    file: AdapterFile,
    expected: Mapping[str, Tensor],
    *,
    strict: bool = True,
    base_names: Collection[str] = (),
) -> tuple[dict[str, str], LoadReport]:
    """Pair every expected key with a key of the file, by header alone.

    Args:
        expected: key -> a tensor, on the meta device as well, with the wanted shape and dtype.
        strict: raise where anything is missing, unexpected or mismatched.
        base_names: names of the base model's parameters, without prefix: a tensor of such a name that is not
            expected counts as a base weight. Without them only keys that say `base_layer` do.

    Returns the usable pairs (expected key -> file key) and the report.

    Raises `CheckpointMismatchError` with all problems, by name.
    """
    pairs: dict[str, str] = {}
    unexpected: list[str] = []
    base_weights: dict[str, str] = {}
    exact = expected.keys() & file.shapes.keys()
    # Exact names first: whatever else a file holds cannot take their place.
    for key in sorted(file.shapes, key=lambda k: k not in exact):
        want = key if key in exact else _other_spelling(key, expected)
        if want is not None and want not in pairs:
            pairs[want] = key
            continue
        base = _base_name(key, base_names) if want is None else None
        if base is not None and base not in base_weights:
            base_weights[base] = key
        else:
            unexpected.append(key)
    mismatched: dict[str, str] = {}
    converted: dict[str, str] = {}
    for want, key in list(pairs.items()):
        problem = _problem(file.shapes[key], expected[want])
        if problem:
            mismatched[want] = problem
            del pairs[want]
        elif DTYPES[file.shapes[key][1]] != expected[want].dtype:
            converted[want] = f"{file.shapes[key][1]} -> {str(expected[want].dtype).removeprefix('torch.')}"
    missing = tuple(key for key in expected if key not in pairs and key not in mismatched)
    report = LoadReport(missing, tuple(sorted(unexpected)), mismatched, base_weights, converted)
    if strict and not report.ok:
        raise CheckpointMismatchError(_message(file, report, expected))
    return {key: pairs[key] for key in expected if key in pairs}, report


def _other_spelling(key: str, expected: Mapping[str, Tensor]) -> str | None:
    """The expected key that `key` is with or without a prefix."""
    for option in (
        PREFIX + key,
        SHARED_PREFIX + key,
        key.removeprefix(PREFIX),
        key.removeprefix(SHARED_PREFIX),
    ):
        if option in expected:
            return option
    return None


def _base_name(key: str, base_names: Collection[str]) -> str | None:
    parts = key.removeprefix(PREFIX).split(".")
    name = ".".join(part for part in parts if part != "base_layer")
    if base_names:
        return name if name in base_names else None
    return name if len(parts) >= 2 and parts[-2] == "base_layer" and parts[-1] in ("weight", "bias") else None


def _problem(found: tuple[tuple[int, ...], str], want: Tensor) -> str | None:
    shape, name = found
    dtype = DTYPES.get(name)
    if dtype is None:
        return f"its dtype {named(name)} cannot be used; {SUPPORTED}"
    if shape != tuple(want.shape):
        return f"the file has the shape {shape}, the adapter {tuple(want.shape)}"
    if dtype.is_floating_point != want.dtype.is_floating_point or (not dtype.is_floating_point and dtype != want.dtype):
        return f"the file has the dtype {name}, and {want.dtype} cannot be made from it"
    return None


def _message(file: AdapterFile, report: LoadReport, expected: Mapping[str, Tensor]) -> str:
    renamed = _renamed(file, report, expected)
    lines = [f"{file.source}: the file does not fit the adapter that its config describes on this model."]
    lines += _section("mismatched", [f"{named(k)}: {why}" for k, why in report.mismatched.items()])
    missing = [f"{named(key)}{_hint(key, report, i)}" for i, key in enumerate(report.missing)]
    lines += _section("missing", missing if not renamed else [named(key) for key in report.missing])
    lines += _section("unexpected", [named(key) for key in report.unexpected])
    if renamed:
        lines.append(renamed)
    lines.append(
        "Nothing was loaded. The adapter was trained on another model or with another config, or the file was edited; "
        "load it on the model it names, or pass strict=False to load what fits and get a report of the rest."
    )
    return "\n".join(lines)


def _section(title: str, entries: list[str]) -> Iterable[str]:
    if entries:
        yield f"{len(entries)} {title}:"
        yield from (f"  {entry}" for entry in entries[:_LISTED])
        if len(entries) > _LISTED:
            yield f"  ... and {len(entries) - _LISTED} more"


def _hint(key: str, report: LoadReport, index: int) -> str:
    # Each search costs up to the number of names: for the first few only.
    return did_you_mean(key, report.unexpected) if report.unexpected and index < _SUGGESTED else ""


def _renamed(file: AdapterFile, report: LoadReport, expected: Mapping[str, Tensor]) -> str:
    """Say so where one change of a prefix turns every missing key into an unexpected one of its shape."""
    if len(report.missing) < 2 or not report.unexpected:  # One alone gets a suggestion.
        return ""
    first, unexpected = report.missing[0], set(report.unexpected)
    parts = first.split(".")
    for start in range(1, len(parts)):
        tail = "." + ".".join(parts[start:])
        for candidate in report.unexpected[:_LISTED]:
            if not candidate.endswith(tail):
                continue
            old, new = first.removesuffix(tail), candidate.removesuffix(tail)
            moved = {key: new + key.removeprefix(old) for key in report.missing if key.startswith(old + ".")}
            if len(moved) == len(report.missing) and all(
                other in unexpected and file.shapes[other][0] == tuple(expected[key].shape)
                for key, other in moved.items()
            ):
                return (
                    f"All {len(moved)} missing tensors are there under another name: {named(candidate)} "
                    f"in the file is {named(first)} here. Does this model name its modules otherwise?"
                )
    return ""

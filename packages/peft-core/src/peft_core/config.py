"""Configurations: what a user writes, what a file holds, and the errors in between.

A config is a frozen pydantic model with the field names of Hugging Face's PEFT, so that `adapter_config.json`
is the same file for both. Every value, from the user or from a file, first becomes plain JSON data and is
then validated strictly: what was accepted once can always be written and read back.

The rules for the two sources differ in one point. A user's unknown keyword is always an error. A file may
come from a newer or another writer: an unknown key passes if it is switched off or declared inert
(`AdapterConfig.inert_keys`), and is an error if it is active, since ignoring it would give wrong numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from .config_errors import readable
from .errors import ConfigError
from .files import write_atomically
from .plain_data import NotPlainError, dump_json, hashable, read_json, to_plain
from .suggest import did_you_mean, shown
from .tasks import TASK_TYPES

CONFIG_NAME = "adapter_config.json"

SelfConfig = TypeVar("SelfConfig", bound="AdapterConfig")

# What a field of several names or numbers holds, and what may be given for it.
if TYPE_CHECKING:
    Names = Sequence[str]
    Indices = Sequence[int]
else:
    Names = tuple[str, ...]
    Indices = tuple[int, ...]


class AdapterConfig(BaseModel):
    """Base of every method's config.

    A subclass gives `peft_type` (the method's name in upper case) and its fields. Fields hold JSON data in
    immutable form: use `tuple[...]`, not `list[...]`. Rules across fields are
    `model_validator(mode="after")`; a field validator with `mode="before"` sees a sequence as a `list` and
    returns a `tuple`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        arbitrary_types_allowed=False,
        validate_default=False,
        protected_namespaces=(),
    )

    peft_type: ClassVar[str]
    # Keys of files that this class has no field for and may ignore. In a mapping the value is the one that is
    # harmless (`...`: any); in a set every value is. A subclass adds to its bases' keys.
    inert_keys: ClassVar[Mapping[str, object] | Set[str]] = frozenset(
        {"peft_version", "auto_mapping", "runtime_config"}
    )
    # Fields left out of files while they have their default: ours, unknown to other readers.
    written_if_set: ClassVar[Set[str]] = frozenset()

    # Arguments of a forward or a generate that are meant for the method: the model itself never sees them.
    request_arguments: ClassVar[tuple[str, ...]] = ()

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __init__(self, **data: Any) -> None:
        if data.get("peft_type") == getattr(self, "peft_type", None):  # said once more, as some do
            data.pop("peft_type", None)
        _validate(self, data, where=None)

    # Tells pydantic that this `__init__` adds no fields and need not be called for nested models.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, decorator in cls.__pydantic_decorators__.model_validators.items():
            # After such a validator pydantic takes the data for Python objects and refuses lists for tuples.
            if decorator.info.mode != "after":
                raise TypeError(
                    f"{cls.__module__}.{cls.__name__}.{name}: a config's model_validator has mode='after'; "
                    "to adopt another spelling found in files, override the classmethod `translate`"
                )

    # ---- values

    @field_validator("task_type")
    @classmethod
    def _known_task_type(cls, value: str | None) -> str | None:
        if value is not None and value not in TASK_TYPES:
            raise ValueError(
                f"unknown task type; the known ones are {', '.join(TASK_TYPES)}." + did_you_mean(value, TASK_TYPES)
            )
        return value

    def refers_to(self) -> Sequence[str]:
        """Names of other adapters of the model that this one is made of: they must be there, and stay."""
        return ()

    @property
    def trains_referred(self) -> bool:
        """Whether those adapters train along with this one; else they stay as they are."""
        return False

    def resolve(self: SelfConfig, **updates: Any) -> SelfConfig:
        """Return a validated copy with `updates`; `self` stays as it is. Raises `ConfigError`."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**values, **updates})

    def model_copy(self: SelfConfig, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> SelfConfig:
        """Like `resolve`: an update is validated, and a copy shares nothing mutable whatever `deep` says."""
        return self.resolve(**(update or {}))

    @classmethod
    def model_validate(cls: type[SelfConfig], obj: Any, **kwargs: Any) -> SelfConfig:
        """Build from a mapping of fields, under the user's rules. Raises `ConfigError`."""
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise ConfigError(f"{cls.__name__} is built from a mapping of fields, not from {shown(obj)}")
        return cls(**obj)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"{type(self).__name__}.{name} cannot be set: configs are frozen. "
            f"Make a changed copy with `config.resolve({name}=...)`."
        )

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"{type(self).__name__}.{name} cannot be deleted: configs are frozen.")

    def __hash__(self) -> int:
        return hash((type(self), hashable(self.__dict__)))

    # ---- files

    @classmethod
    def translate(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Turn a file's content into this class's own fields; for spellings of other or older writers.

        Called before anything is checked, with a copy of the data without `peft_type`. Leave unknown keys in:
        the caller decides about them.
        """
        return data

    def to_dict(self, *, inference_mode: bool | None = None) -> dict[str, Any]:
        """Return the content of the config's file: all fields and `peft_type`, as plain JSON data.

        `inference_mode` overrides the field: a saved adapter says true, whatever the running one says.
        """
        fields = type(self).model_fields
        data = {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if not (name in self.written_if_set and getattr(self, name) == fields[name].get_default())
        }
        if inference_mode is not None:
            data["inference_mode"] = inference_mode
        peft_type = getattr(self, "peft_type", None)
        if peft_type is not None:
            data["peft_type"] = peft_type
        return data

    def beside_tensors(self, *, inference_mode: bool | None = None) -> dict[str, Any]:
        """Return what an adapter's file holds: `to_dict`, unless another config describes the form of its tensors.

        `translate` turns it back.
        """
        return self.to_dict(inference_mode=inference_mode)

    def to_json(self, *, inference_mode: bool | None = None) -> str:
        """Return `to_dict` as text: sorted keys, indent 2, final newline."""
        return dump_json(self.to_dict(inference_mode=inference_mode))

    @classmethod
    def from_dict(cls: type[SelfConfig], data: Mapping[str, Any], *, source: str = "the data") -> SelfConfig:
        """Build from a file's content; `source` names it in errors.

        Raises `ConfigError` for a value that does not fit and for a key that is active but unknown.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: a config is a mapping of keys to values, not {shown(data)}")
        own = getattr(cls, "peft_type", None)
        found = data.get("peft_type")
        if own is None:
            return cast("type[SelfConfig]", _config_class(found, source)).from_dict(data, source=source)
        if found is not None and found != own:
            raise ConfigError(
                f"{source}: peft_type is {shown(found)}, and {cls.__name__} reads {own!r}. "
                "Use AdapterConfig.from_pretrained, which picks the class from the file."
            )
        values = cls.translate({key: value for key, value in data.items() if key != "peft_type"})
        known: dict[str, Any] = {}
        problems: list[str] = []
        for key, value in values.items():
            if key in cls.model_fields:
                known[key] = value
            elif not (_off(value) or cls._is_inert(key, value)):
                problems.append(
                    f"{shown(key)}: {cls.__name__} has no such option, and the file switches it on "
                    f"({shown(value)}). Ignoring it would give other numbers than the writer's. Install a "
                    "version of the method's package that knows it, or remove the key if it is harmless."
                    + did_you_mean(str(key), cls.model_fields)
                )
        self = cls.__new__(cls)
        _validate(self, cls._switched_off(known), where=source, problems=problems)
        return self

    @classmethod
    def _switched_off(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Turn a file's ways of saying "not used" into the field's default."""
        return data

    @classmethod
    def _is_inert(cls, key: str, value: object) -> bool:
        for base in cls.__mro__:
            inert = base.__dict__.get("inert_keys", ())
            if key in inert:
                if not isinstance(inert, Mapping):
                    return True
                harmless = inert[key]
                if harmless is ... or (type(harmless) is type(value) and harmless == value):
                    return True
        return False

    @classmethod
    def from_json_file(cls: type[SelfConfig], path: str | os.PathLike[str]) -> SelfConfig:
        """Read one file, within limits on its size, depth and lists. Raises `ConfigError`."""
        data = read_json(path)
        if "peft_type" not in data:
            raise ConfigError(f"{path}: no 'peft_type': this is not the config of an adapter.")
        return cls.from_dict(data, source=os.fspath(path))

    @classmethod
    def from_pretrained(cls: type[SelfConfig], directory: str | os.PathLike[str]) -> SelfConfig:
        """Read a directory's `adapter_config.json`; for a base class, its `peft_type` picks the class."""
        path = Path(directory) / CONFIG_NAME
        if not path.is_file():
            raise ConfigError(f"{path} does not exist. Give the directory an adapter was saved in.")
        return cls.from_json_file(path)

    def save_pretrained(self, directory: str | os.PathLike[str], *, inference_mode: bool | None = None) -> Path:
        """Write `adapter_config.json` into a directory, atomically, and return its path. Raises `OSError`."""
        path = Path(directory) / CONFIG_NAME
        content = self.to_json(inference_mode=inference_mode).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        return path


PeftConfig = AdapterConfig


class TargetedConfig(AdapterConfig):
    """A config whose method sits on modules chosen by name. How names match is told in `targets`."""

    # Roles (see `architectures`) that get an adapter when `target_modules` is not given; `default_roles_for`
    # holds the model types for which the method's authors chose others.
    default_roles: ClassVar[tuple[str, ...]] = ()
    default_roles_for: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Whether an empty `target_modules` is meaningful: the method has sites beyond the matched modules.
    allow_no_targets: ClassVar[bool] = False

    target_modules: str | Names | None = None
    exclude_modules: str | Names | None = None
    layers_to_transform: int | Indices | None = None
    layers_pattern: str | Names | None = None
    modules_to_save: Names | None = None

    @field_validator("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", mode="before")
    @classmethod
    def _names(cls, value: Any, info: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            if info.field_name == "modules_to_save":
                raise ValueError("give a list of names, not one string")
            if not value:
                raise ValueError("an empty string names nothing; leave the field out, or give names")
            return value
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            kinds = "names" if info.field_name == "modules_to_save" else "names, or a string"
            raise ValueError(f"give a list of {kinds}")
        if not value and not (info.field_name == "target_modules" and cls.allow_no_targets):
            raise ValueError("an empty list names nothing; leave the field out, or give names")
        if not all(value):
            raise ValueError("one of the names is the empty string")
        return tuple(dict.fromkeys(value))

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _indices(cls, value: Any) -> Any:
        if value is None:
            return None
        indices = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(type(index) is int and index >= 0 for index in indices):
            raise ValueError("give a layer index, or a list of them; indices are integers from 0 on")
        if not indices:
            raise ValueError("an empty list selects no layer; leave the field out, or give indices")
        return tuple(dict.fromkeys(indices)) if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _layers_need_names(self) -> TargetedConfig:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where the layer index is; it needs layers_to_transform")
        pattern = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if self.layers_to_transform is not None and pattern:
            raise ValueError(
                "layers_to_transform and layers_pattern select among listed names; target_modules is a "
                "regular expression: put the layers into it, or give a list"
            )
        return self

    @classmethod
    def _switched_off(cls, data: dict[str, Any]) -> dict[str, Any]:
        optional = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        return {key: value for key, value in data.items() if not (key in optional and _off(value))}


# ---- validation


def _validate(self: AdapterConfig, data: Mapping[str, Any], *, where: str | None, problems: Sequence[str] = ()) -> None:
    """Fill `self` from `data`, or raise one `ConfigError` with all problems."""
    cls = type(self)
    lines = list(problems)
    plain: dict[str, Any] = {}
    unusable: set[str] = set()
    for name, value in data.items():
        try:
            plain[name] = to_plain(value, name)
        except NotPlainError as error:
            unusable.add(name)
            lines.append(str(error))
    try:
        self.__pydantic_validator__.validate_json(json.dumps(plain, allow_nan=False), strict=True, self_instance=self)
    except ValidationError as error:
        lines += readable(cls, error, unusable)
    if lines:
        origin = f"{where}: " if where else ""
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError(f"{origin}{count} in {cls.__name__}:\n" + "\n".join(f"  {line}" for line in lines))


def _config_class(peft_type: object, source: str) -> type[AdapterConfig]:
    """Find the class that reads a `peft_type`, by the installed methods. Raises `ConfigError`."""
    if not isinstance(peft_type, str) or not peft_type:
        raise ConfigError(f"{source}: peft_type is {shown(peft_type)}; it names the method of an adapter.")
    from .methods import load_method

    return load_method(peft_type.lower()).config_class


def _off(value: object) -> bool:
    """Whether a file's value says that an option is not used. Zero does not: it may be a setting."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)


__all__ = [
    "CONFIG_NAME",
    "AdapterConfig",
    "Indices",
    "Names",
    "PeftConfig",
    "TargetedConfig",
]

"""Which modules of a model a config means, and everything that is wrong with what it says, at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .architectures import default_targets, missing_roles, model_type_of
from .config import AdapterConfig
from .extensions import extensions
from .hook_results import call_extensions
from .layers import is_conv1d
from .patterns import NameMatcher, ends
from .suggest import did_you_mean
from .tree import walk

ALL_LINEAR = "all-linear"

# Heads that a task puts on a model with fresh weights: they are trained along with the adapter.
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# More lines than this help nobody, and each costs a search for the nearest name.
_MAX_LINES = 20

Match = Callable[[str, nn.Module], "bool | None"]


@dataclass(frozen=True)
class Selection:
    """What a config selects of a model.

    `matched` maps paths to modules, in the model's order. `resolved` are the config's fields as this run
    understood them, for `config.resolve`. Problems forbid to go on; notes are worth showing.
    """

    matched: dict[str, nn.Module] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def select(
    model: nn.Module,
    config: AdapterConfig,
    *,
    modules: Sequence[tuple[str, nn.Module]] | None = None,
    match: Match | None = None,
    trusted: bool = True,
    other_sites: bool = False,
) -> Selection:
    """Select the modules that `config` targets, and those it keeps a trained copy of.

    Args:
        modules: paths and base modules of the model (`walk(model).modules`), where they are known already. A
            module under several paths is selected under the first; a name that fits any of them counts.
        match: a method's own rule, asked with path and module; None leaves the module to `target_modules`.
            `exclude_modules`, `modules_to_save` and `layers_to_transform` limit both.
        trusted: the config was written by the user. From a file, a name that matches nothing is a note only:
            other writers store their default names whether or not the model has them all.
        other_sites: the method acts elsewhere too, so it is fine if no module matches.

    Raises `ConfigError` for patterns that cannot be used; all else is in `Selection.problems`.
    """
    return _Selector(model, config, walk(model).modules if modules is None else modules, trusted).run(
        match, other_sites
    )


class _Selector:
    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        modules: Sequence[tuple[str, nn.Module]],
        trusted: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.trusted = trusted
        self.result = Selection()
        self.modules: dict[str, nn.Module] = {}
        self.places = dict(modules)
        paths: dict[int, str] = {}
        self.aliases: dict[str, list[str]] = {}
        for path, module in modules:
            first = paths.setdefault(id(module), path)
            if first == path:
                self.modules[path] = module
            else:
                self.aliases.setdefault(first, []).append(path)

    def run(self, match: Match | None, other_sites: bool) -> Selection:
        saved = self._modules_to_save()
        targets, is_default = self._targets()
        everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        matcher = None
        if targets is not None and not everything:
            matcher = NameMatcher(targets, what="target_modules", trusted=self.trusted or is_default)
        exclude = self._matcher("exclude_modules")
        layers = _Layers(self.config)
        head = self._output_embedding()
        wanted = 0
        pool: list[str] = []
        for path, module in self.modules.items():
            names = self._names(path)
            answer = match(path, module) if match is not None else None
            # Every matcher sees every name: an entry that is overruled elsewhere is not a misspelt one.
            by_name = matcher is not None and path != "" and matcher.matches(*names)
            excluded = exclude is not None and exclude.matches(*names)
            linear = everything and module is not head and self._is_linear(path, module)
            hit = by_name or linear
            hit = hit if answer is None else answer
            wanted += hit
            inside = layers.admit(names, hit)
            if excluded or not inside or _within(path, saved):
                continue
            pool.append(path)
            if self._read_past(path):
                if hit and not everything and not is_default:
                    self.result.problems.append(
                        f"target_modules: {path!r} is the output projection of an nn.MultiheadAttention, "
                        "which reads the weight itself and never calls the module: an adapter there would do "
                        "nothing. Target the attention module, or exclude this one."
                    )
                continue
            if hit:
                self.result.matched[path] = module
        if matcher:
            self._unmatched("target_modules", matcher.unmatched(), note=is_default)
        if exclude:
            self._unmatched("exclude_modules", exclude.unmatched())
        for problem in layers.problems() if wanted else ():
            self._say(problem, note=not self.trusted)
        if everything and self.result.matched:
            names_of_all = _fewest_names(self.result.matched, pool)
            self.result.resolved["target_modules"] = names_of_all
            if isinstance(names_of_all, str) and layers.indices is not None:
                # Whole paths say which layers; a config does not take both.
                self.result.resolved.update(layers_to_transform=None, layers_pattern=None)
        elif matcher and is_default:
            unmatched = set(matcher.unmatched())
            found = tuple(entry for entry in matcher.entries if entry not in unmatched)
            if found:
                self.result.resolved["target_modules"] = targets if isinstance(targets, str) else found
        self._check_empty(targets, wanted, other_sites)
        return self.result

    def _targets(self) -> tuple[str | tuple[str, ...] | None, bool]:
        """The target entries, if any, and whether they are the model type's default."""
        given = getattr(self.config, "target_modules", None)
        if given is not None or "target_modules" not in type(self.config).model_fields:
            return given, False
        return default_targets(type(self.config), model_type_of(self.model)), True

    def _check_empty(self, targets: str | tuple[str, ...] | None, wanted: int, other_sites: bool) -> None:
        """Selecting nothing is an error, unless it is meant, or explained by a problem found before."""
        if self.result.matched or self.result.problems or other_sites or targets == ():
            return
        if wanted:
            self.result.problems.append(
                f"target_modules: all {wanted} modules that match are taken out again by exclude_modules, "
                "layers_to_transform or modules_to_save."
            )
        elif targets is not None:
            shown = targets if isinstance(targets, str) else list(targets[:_MAX_LINES])
            self.result.problems.append(
                f"target_modules: {shown!r} matches no module of the model. Its modules end in "
                f"{', '.join(sorted(self._endings(1))[:_MAX_LINES])}."
            )
        elif "target_modules" in type(self.config).model_fields:
            model_type = model_type_of(self.model)
            about = f"the model type {model_type!r}" if model_type else f"a {type(self.model).__name__}"
            missing = missing_roles(type(self.config), model_type)
            why = f" (its default_roles name {missing[0]!r}, which that type does not have)" if missing else ""
            self.result.problems.append(
                f"target_modules is not given, and {type(self.config).__name__} has no default for {about}{why}. "
                f"Give names of modules (target_modules=[...]), give target_modules={ALL_LINEAR!r}, or tell "
                "what the model type's modules are called with the hook peft_architectures."
            )

    def _modules_to_save(self) -> list[str]:
        """Paths of the modules that get a trained copy: the user's, and the task's head where present."""
        given: tuple[str, ...] = getattr(self.config, "modules_to_save", None) or ()
        heads = TASK_HEADS.get(self.config.task_type or "", ())
        entries = (*given, *(head for head in heads if head not in given))
        if not entries:
            return []
        matcher = NameMatcher(entries, what="modules_to_save", trusted=self.trusted)
        paths: list[str] = []
        for path in self.modules:
            # A copy holds the copies of what is inside.
            if path and matcher.matches(*self._names(path)) and not _within(path, paths):
                paths.append(path)
        unmatched = matcher.unmatched()
        self._unmatched("modules_to_save", [entry for entry in unmatched if entry not in heads])
        found = tuple(entry for entry in entries if entry in given or entry not in unmatched)
        if found != given and "modules_to_save" in type(self.config).model_fields:
            self.result.resolved["modules_to_save"] = found
        self.result.modules_to_save.extend(paths)
        return paths

    def _matcher(self, name: str) -> NameMatcher | None:
        entries = getattr(self.config, name, None)
        return None if entries is None else NameMatcher(entries, what=name, trusted=self.trusted)

    def _names(self, path: str) -> list[str]:
        """`path`, and the others under which the module, or one that contains it, is registered."""
        if not self.aliases:
            return [path]
        names = [path, *self.aliases.get(path, ())]
        at = path.rfind(".")
        while at > 0:
            names += [other + path[at:] for other in self.aliases.get(path[:at], ())]
            at = path.rfind(".", 0, at)
        return names

    def _is_linear(self, path: str, module: nn.Module) -> bool:
        """Whether a module is a linear layer, be its class one or an extension's view of its storage."""
        if isinstance(module, nn.Linear) or is_conv1d(module):
            return True
        if not extensions.hook.peft_layer.get_hookimpls():
            return False
        view = call_extensions("peft_layer", path=path, module=module)
        return view is not None and view.kind == "linear"

    def _read_past(self, path: str) -> bool:
        """Whether the module's parent uses its weight without calling it."""
        parent, _, name = path.rpartition(".")
        return name == "out_proj" and isinstance(self.places.get(parent), nn.MultiheadAttention)

    def _output_embedding(self) -> nn.Module | None:
        getter = getattr(self.model, "get_output_embeddings", None)
        try:
            head = getter() if callable(getter) else None
        except (AttributeError, NotImplementedError):  # Models that have none do not agree on how to say so.
            head = None
        return getattr(head, "base_layer", head)  # It may carry an adapter already.

    def _endings(self, length: int) -> set[str]:
        """The last `length` components of the paths of all modules."""
        return {".".join(path.rsplit(".", length)[-length:]) for path in self.places if path}

    def _unmatched(self, name: str, entries: list[str], note: bool = False) -> None:
        note = note or not self.trusted
        for entry in entries[:_MAX_LINES]:
            hint = "" if note else did_you_mean(entry, self._endings(entry.count(".") + 1))
            self._say(f"{name}: {entry!r} matches no module of the model.{hint}", note)
        if len(entries) > _MAX_LINES:
            self._say(f"{name}: {len(entries) - _MAX_LINES} more entries match no module.", note)

    def _say(self, text: str, note: bool) -> None:
        (self.result.notes if note else self.result.problems).append(text)


class _Layers:
    """`layers_to_transform` and `layers_pattern`: the index of a module's layer, read from its path.

    Without a pattern it is the first number in the path, else the number that follows a name of the pattern.
    """

    def __init__(self, config: AdapterConfig) -> None:
        indices = getattr(config, "layers_to_transform", None)
        pattern = getattr(config, "layers_pattern", None)
        self.indices = None if indices is None else {indices} if isinstance(indices, int) else set(indices)
        self.patterns = (pattern,) if isinstance(pattern, str) else pattern or ()
        self.seen: set[int] = set()
        self.used: set[str] = set()

    def admit(self, names: Iterable[str], hit: bool) -> bool:
        """Whether a module of these names is in one of the layers; remembers what a hit has shown."""
        if self.indices is None:
            return True
        found = {index for name in names if (index := self._index(name)) is not None}
        if hit:
            self.seen |= found
        return not found.isdisjoint(self.indices)

    def _index(self, path: str) -> int | None:
        parts = path.split(".")
        for at, part in enumerate(parts):
            if not (part.isascii() and part.isdigit()):
                continue
            if not self.patterns:
                return int(part)
            for pattern in self.patterns:
                if pattern in ends(".".join(parts[:at])):
                    self.used.add(pattern)
                    return int(part)
        return None

    def problems(self) -> list[str]:
        """What nothing in the model answers to."""
        if self.indices is None:
            return []
        lines = [
            f"layers_pattern: no number follows {pattern!r} in the path of any module."
            for pattern in self.patterns
            if pattern not in self.used
        ]
        if missing := sorted(self.indices - self.seen):
            there = f"the targets are in layers {_ranges(self.seen)}" if self.seen else "they have no layer index"
            lines.append(f"layers_to_transform: no target in layer {_ranges(missing)}; {there}.")
        return lines


def _within(path: str, outer: Sequence[str]) -> bool:
    return any(path == other or path.startswith(other + ".") for other in outer)


def _fewest_names(matched: Iterable[str], pool: Iterable[str]) -> str | tuple[str, ...]:
    """Names that select `matched` and nothing else of `pool`, each as short as can be."""
    chosen = set(matched)
    taken = {end for path in pool if path not in chosen for end in ends(path)}
    names: dict[str, None] = {}
    for path in matched:
        free = [end for end in ends(path) if end not in taken]
        if not free:
            # The whole path ends another one (x and a.x): only a regular expression tells them apart.
            return "|".join(re.escape(each) for each in matched)
        names[free[-1]] = None
    return tuple(names)


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:_MAX_LINES])

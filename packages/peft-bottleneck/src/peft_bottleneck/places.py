"""Where adapters sit in a model: blocks, their sub-layers, and the modules that stand for h and x."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from peft_core import ConfigError, SiteRequest, TargetError, role_paths

from .config import BottleneckConfig

OUTPUT, SUM, STREAM, PARALLEL, RECORDER = "output", "sum", "stream", "parallel", "recorder"
"""Forms of adapters, in the `meta` of their sites."""

# The modules whose output is h, the first role found counts; and those whose input is x where no norm's is.
_LAST = {
    "attention": ("attention_branch_norm", "output"),
    "cross": ("cross_output",),
    "feed_forward": ("feed_forward_branch_norm", "feed_forward", "down"),
}
_FIRST = {"attention": ("query",), "cross": ("query",), "feed_forward": ("gate", "up")}


@dataclass(frozen=True)
class Place:
    """One adapter's place.

    Attributes:
        stack: path of the list of blocks.
        index: of the block in that list.
        number: of the layer in the whole model.
        kind: "attention", "cross" or "feed_forward".
        form: what kind of adapter it is.
        path: of the module it sits at.
        source: of the module whose input is x, where the form needs it.
    """

    stack: str
    index: int
    number: int
    kind: str
    form: str
    path: str
    source: str | None = None


def places(config: BottleneckConfig, model: nn.Module) -> list[Place]:
    """The places of a complete config's adapters, in the model's order.

    Raises:
        TargetError: the model's type, or one of the roles needed, is not known.
        ConfigError: the config speaks of layers or sub-layers that the model does not have.
    """
    blocks = _Blocks(model)
    _check_layers(config, blocks.total)
    wanted = {"attention": config.mh_adapter, "cross": config.cross_adapter, "feed_forward": config.output_adapter}
    kinds = [kind for kind in wanted if wanted[kind]]
    found = list(_find(config, blocks, kinds))
    for kind in kinds:
        if not any(place.kind == kind for place in found) and len(set(config.leave_out)) < blocks.total:
            field = {"attention": "mh_adapter", "cross": "cross_adapter", "feed_forward": "output_adapter"}[kind]
            raise TargetError(
                f"{field}: no block of the model has a module in the role {' or '.join(map(repr, _LAST[kind]))}. "
                f"Switch it off ({field}=False), or tell the role of this model type with the hook peft_architectures"
            )
    return found


def requests(config: BottleneckConfig, model: nn.Module) -> list[SiteRequest]:
    """The sites of these places, and of the recorders they need. Raises as `places`."""
    chosen = places(config, model)
    if not chosen:
        raise ConfigError("leave_out: it leaves out every layer of the model")
    last = {place.source: place for place in chosen if place.source is not None}
    sites: dict[str, SiteRequest] = {}
    for place in chosen:
        meta = {"form": place.form, "number": place.number, "source": place.source}
        if place.source is not None:
            meta["last"] = last[place.source] is place
            sites.setdefault(place.source, SiteRequest(place.source, meta={"form": RECORDER}))
        sites[place.path] = SiteRequest(place.path, meta=meta)
    return list(sites.values())


def _find(config: BottleneckConfig, blocks: _Blocks, kinds: list[str]) -> Iterator[Place]:
    number = -1
    for stack, size in blocks.stacks.items():
        for index in range(size):
            number += 1
            for kind in kinds if number not in config.leave_out else ():
                block = f"{stack}.{index}"
                path = next((path for role in _LAST[kind] if (path := blocks.one(block, role))), None)
                if path is None:
                    continue
                form, source = OUTPUT, None
                if config.style == "pfeiffer" and (norm := blocks.one(block, f"{kind}_add_norm")):
                    form, path = SUM, norm
                elif config.style != "houlsby":
                    form = STREAM if config.style == "pfeiffer" else PARALLEL
                    source = blocks.residual(block, kind, path)
                yield Place(stack, index, number, kind, form, path, source)


class _Blocks:
    """A model's blocks, and the modules in them by role."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stacks = {path: len(model.get_submodule(path)) for path in role_paths(model, "blocks")}  # type: ignore[arg-type]
        if not self.stacks:
            raise TargetError("the model has no module in the role 'blocks', the list of its layers")
        self.total = sum(self.stacks.values())

    @functools.cache  # noqa: B019  # lives as long as the search
    def _role(self, role: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in role_paths(self.model, role):
            for stack in self.stacks:
                if path.startswith(f"{stack}."):
                    index = path[len(stack) + 1 :].partition(".")[0]
                    found.setdefault(f"{stack}.{index}", []).append(path)
        return found

    def one(self, block: str, role: str) -> str | None:
        """The module of a role in a block. Raises `TargetError` where it has several."""
        if role == "cross_branch_norm":
            return None
        found = self._role(role).get(block, [])
        if len(found) > 1:
            raise TargetError(
                f"{block}: several modules have the role {role!r} ({', '.join(found)}), and a bottleneck adapter "
                "changes the output of a whole sub-layer; name modules with target_modules instead"
            )
        return found[0] if found else None

    def residual(self, block: str, kind: str, last: str) -> str:
        """The module whose input is the residual stream x of a sub-layer. Raises `TargetError`."""
        norm = self.one(block, f"{kind}_norm")
        if norm is not None:
            return norm
        # Norms behind the sub-layer, and so none between the stream and its first projection.
        if self.one(block, f"{kind}_add_norm") or self.one(block, f"{kind}_branch_norm"):
            near = [path for role in _FIRST[kind] for path in self._role(role).get(block, [])]
            if near:
                return max(near, key=lambda path: _common(path, last))
        raise TargetError(
            f"{block}: where the residual stream enters the sub-layer of {last} is not known: no module of this "
            f"model type has the role '{kind}_norm', '{kind}_branch_norm' or '{kind}_add_norm'. Take style "
            '"houlsby", which does not need it, or tell the role with the hook peft_architectures'
        )


def _common(one: str, other: str) -> int:
    """How many first components two paths share."""
    same = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        same += 1
    return same


def _check_layers(config: BottleneckConfig, total: int) -> None:
    outside = [layer for layer in config.leave_out if layer >= total]
    if outside:
        raise ConfigError(f"leave_out: the model has no layer {outside}; it has {total}, counted from 0")
    factors = config.reduction_factor
    if isinstance(factors, dict):
        unknown = [key for key in factors if key != "default" and int(key) >= total]
        if unknown:
            raise ConfigError(f"reduction_factor: the model has no layer {unknown}; it has {total}, counted from 0")
        missing = [n for n in range(total) if str(n) not in factors and n not in config.leave_out]
        if missing and "default" not in factors:
            raise ConfigError(f'reduction_factor: nothing is given for layers {missing}; add "default"')

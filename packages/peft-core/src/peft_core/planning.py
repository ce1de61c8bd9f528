"""From a model and a config to everything that would happen, before anything happens.

`draft` selects the sites, makes their views and builds the adapters off the tree; it collects every problem
instead of stopping at the first, and leaves the model untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import hook_results
from .adapter import Adapter
from .bare import owner_of
from .config import AdapterConfig, TargetedConfig
from .errors import PeftError, TargetError, add_note
from .layers import BaseLayer, SiteRequest, layer_of
from .methods import Method, load_method
from .records import AdapterRecord, AdapterState, PeftState, Structure, state_of
from .root import RootLayer
from .saved_modules import SavedModule, saved_module_requests
from .starts import calibrate, put, slots_of, unused
from .targets import Selection, select
from .tree import Tree, walk

TensorsFor = Callable[[SiteRequest], Mapping[str, Tensor] | None]

HALF = (torch.float16, torch.bfloat16)
META = torch.device("meta")


@dataclass
class Draft:
    """An adapter built off the tree, or the problems that keep it from being built."""

    record: AdapterRecord
    layers: list[BaseLayer]
    tree: Tree
    problems: list[str]

    def check(self) -> None:
        """Raise `TargetError` with all problems at once, if there are any."""
        if self.problems:
            raise TargetError(
                f"cannot adapt the model with {type(self.record.config).__name__}; nothing was changed:\n"
                + "\n".join(f"- {problem}" for problem in self.problems)
            )


def draft(
    model: nn.Module,
    name: str,
    config: AdapterConfig,
    *,
    method: Method | None = None,
    device: torch.device | None = None,
    float32: bool = True,
    trusted: bool = True,
    tensors: TensorsFor | None = None,
    start: AdapterState | None = None,
    calibration: Iterable[Any] | None = None,
) -> Draft:
    """Select, view and build, without touching the model.

    Args:
        device: where adapters are built; None for the device of each base layer.
        float32: keep adapters of half-precision layers in float32 (they compute in the layer's dtype).
        trusted: whether patterns in the config were written by the user, rather than read from a file.
        tensors: the checkpoint's part for a site, where one is loaded; then nothing is initialised.
        start: values for some slots, put over their starting values.
        calibration: batches for methods that start from data; what they say of it is `start`.
    """
    method = method or load_method(config.peft_type)
    state = state_of(model)
    structure = _structure(model, state, method, config)
    tree = walk(model, structure.modules if structure else None)
    for path, site in tree.sites.items():
        if state is None or site._routing is not state.routing:
            raise TargetError(
                f"{path} carries adapters of a model inside this one, which has its own switches; adapt one of the two "
                "models, or call unload() on the inner one first"
            )
    config, layers, problems = _views(model, tree, state, name, method, config, float32=float32, trusted=trusted)
    if calibration is not None and structure is not None:
        problems.append("the config changes the model's build, so data cannot be run through it before; leave them out")
    if calibration is not None and not problems:
        start = calibrate(model, name, method, config, layers, calibration)
        if start is not None and start.config != config:
            config, layers, problems = _views(
                model, tree, state, name, method, start.config, float32=float32, trusted=trusted
            )
    shared = nn.Module()
    record = AdapterRecord(name, method, config, [layer.request for layer in layers], [], shared, structure=structure)
    result = Draft(record, layers, tree, problems)
    plugged = [layer for layer in layers if not layer.request.copied]
    if problems:
        return result
    try:
        hook_results.call(
            method,
            "peft_prepare",
            model=model,
            name=name,
            config=config,
            layers=plugged,
            shared=shared,
            trusted=trusted,
        )
    except PeftError as error:
        problems.append(str(error))
        return result
    built: list[BaseLayer] = []
    for layer in layers:
        layer.build_device = device
        found = tensors(layer.request) if tensors else start.tensors.get(layer.request.key) if start else None
        try:
            adapter = build(record, layer, model, found, initialise=tensors is None)
            if start is not None and found:
                put(found, adapter.slots(), layer.path, adapter.parts)
            record.adapters.append(adapter)
            built.append(layer)
        except PeftError as error:
            problems.append(str(error))
        finally:
            layer.build_device = None
    result.layers = built
    if start is not None and not problems:
        problems += unused(start, layers)
        put(start.shared, slots_of(shared), "the shared module")
    if not problems:
        record.note_learned()
    return result


def _structure(model: nn.Module, state: PeftState | None, method: Method, config: AdapterConfig) -> Structure | None:
    """What the method wants built otherwise. Raises `TargetError` where that cannot be."""
    found: Structure | None = hook_results.call(method, "peft_structure", config=config, model=model)
    if found is None:
        return None
    if state is not None and state.adapters:
        raise TargetError(
            f"the {method.label} changes the build of the model, which has adapters {list(state.adapters)} already; "
            "add it first, and the others after it"
        )
    present = {path for path, _ in model.named_modules()}
    if missing := [path for path in found.modules if not path or path not in present]:
        raise TargetError(f"the {method.label} replaces modules that the model does not have: {missing}")
    return found


def _views(
    model: nn.Module,
    tree: Tree,
    state: PeftState | None,
    name: str,
    method: Method,
    config: AdapterConfig,
    *,
    float32: bool,
    trusted: bool,
) -> tuple[AdapterConfig, list[BaseLayer], list[str]]:
    """The resolved config, the views of the sites it selects, and every problem on the way."""
    requests, config, problems = _select(model, tree, method, config, trusted)
    problems += _within_copies(state, name, requests)
    layers: list[BaseLayer] = []
    for request in requests:
        try:
            layer = view(tree, request)
            layer.build_dtype = _dtype(layer, float32)
            layers.append(layer)
        except PeftError as error:
            problems.append(str(error))
    return config, layers, problems


def build(
    record: AdapterRecord,
    layer: BaseLayer,
    model: nn.Module,
    tensors: Mapping[str, Tensor] | None,
    *,
    initialise: bool,
) -> Adapter:
    """One adapter at one layer, off the tree."""
    adapter: Adapter
    if layer.request.copied:
        built = zip(record.requests, record.adapters, strict=False)
        copies = {request.path: one for request, one in built if isinstance(one, SavedModule)}
        adapter = SavedModule(layer, copies.get(layer.request.tied_to))
    else:
        adapter = hook_results.call(
            record.method,
            "peft_build",
            config=record.config,
            layer=layer,
            shared=record.shared,
            model=model,
            tensors=tensors,
        )
    adapter.__dict__["shared"] = record.shared  # by reference: a registered child would be saved once per site
    if initialise:
        try:
            with torch.no_grad():
                adapter.reset_parameters()
        except Exception as error:
            if not isinstance(error, PeftError):
                where = layer.path or "the model itself"
                add_note(
                    error,
                    f"Raised in {type(adapter).__name__}.reset_parameters at {where}, of the {record.method.label}.",
                )
            raise
    return adapter


def view(tree: Tree, request: SiteRequest) -> BaseLayer:
    """The storage view of the module a request names. Raises `TargetError`."""
    module = tree.module(request.path)
    if module is None:
        raise TargetError(f"{request.path}: the model has no such module")
    missing = [name for name in request.names if not _has_parameter(module, name)]
    if missing:
        raise TargetError(f"{request.path}: {type(module).__name__} has no parameter {missing[0]!r}")
    layer: BaseLayer | None = None
    if not request.path and not request.copied:
        return RootLayer(module, "", request)
    if not request.copied:
        layer = hook_results.call_extensions("peft_layer", path=request.path, module=module)
    if layer is None:
        layer = BaseLayer(module, request.path, request) if request.copied else layer_of(module, request)
    else:
        layer.request = request
    return layer


def _has_parameter(module: nn.Module, name: str) -> bool:
    try:
        owner, attribute = owner_of(module, name)
        return owner._parameters.get(attribute) is not None
    except AttributeError:
        return False


def _select(
    model: nn.Module, tree: Tree, method: Method, config: AdapterConfig, trusted: bool
) -> tuple[list[SiteRequest], AdapterConfig, list[str]]:
    requests: list[SiteRequest] = []
    problems: list[str] = []
    matched: Mapping[str, nn.Module] = MappingProxyType({})

    def ask(hook_name: str, otherwise: Any) -> Any:
        """What a hook makes of the matched modules; its refusal is one problem among the others."""
        try:
            return hook_results.call(method, hook_name, config=config, model=model, matched=matched)
        except PeftError as error:
            problems.append(str(error))
            return otherwise

    if isinstance(config, TargetedConfig):

        def match(path: str, module: nn.Module) -> bool | None:
            answer: bool | None = hook_results.call(
                method, "peft_match", config=config, path=path, module=module, model=model
            )
            return answer

        has_match = bool(method.hook.peft_match.get_hookimpls())

        def choose(other_sites: bool) -> Selection:
            return select(
                model,
                config,
                modules=tree.modules,
                match=match if has_match else None,
                trusted=trusted,
                other_sites=other_sites,
            )

        selection = choose(True)
        matched = MappingProxyType(selection.matched)
        targeted, config = config, config.resolve(**selection.resolved)
        config = ask("peft_resolve", config)
        extra: list[SiteRequest] = ask("peft_sites", [])
        if not matched and not extra and not problems:
            config = targeted
            selection = choose(False)  # now with what there is to say about a selection that is empty
        problems.extend(selection.problems)
        requests += [SiteRequest(path) for path in selection.matched]
        requests += saved_module_requests(list(selection.modules_to_save))
    else:
        config = ask("peft_resolve", config)
        extra = ask("peft_sites", [])
    requests += extra
    seen: set[tuple[str, str]] = set()
    for request in requests:
        if (request.path, request.part) in seen:
            problems.append(f"{request.path}: two adapters of one name are asked for at this module")
        seen.add((request.path, request.part))
    if not requests and not problems:
        problems.append("the config selects nothing of the model")
    return requests, config, problems


def _within_copies(state: PeftState | None, name: str, requests: list[SiteRequest]) -> Iterator[str]:
    """Adapters inside a module that is copied whole: the copy would bypass them, or hold them."""
    others = [record for record in state.adapters.values() if record.name != name] if state else []
    owned = [(name, request) for request in requests]
    owned += [(other.name, request) for other in others for request in other.requests]
    copies = [(owner, request) for owner, request in owned if request.copied]
    for outer, copied in copies:
        for inner, request in owned:
            if name in (outer, inner) and request.path.startswith(f"{copied.path}."):
                yield (
                    f"{request.path}: adapter {inner!r} would sit inside {copied.path}, of which adapter {outer!r} "
                    "trains a copy of its own (modules_to_save); adapt the module in one of the two ways, or keep the "
                    "two adapters on separate copies of the model"
                )


def _dtype(layer: BaseLayer, float32: bool) -> torch.dtype | None:
    own = layer.dtype
    if not own.is_floating_point or own.itemsize == 1 or (float32 and own in HALF):
        return torch.float32
    return None

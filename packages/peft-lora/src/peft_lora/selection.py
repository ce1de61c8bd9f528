"""Sites beyond the matched modules: single parameters, biases, rows of embeddings, and layers tied to adapted ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from peft_core.biases import bias_sites
from peft_core.errors import TargetError
from peft_core.layers import SiteRequest
from peft_core.patterns import NameMatcher
from peft_core.tree import walk

from .config import LoraConfig

FORM = "form"
PARAMETER, ROWS, TIED_ROWS = "parameter", "rows", "tied rows"


class Model:
    """The model's base modules, each under its first path, walked when they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self._with_weight: dict[int, list[str]] = {}
        seen: set[int] = set()
        for path, module in walk(model).modules:
            if id(module) not in seen:
                seen.add(id(module))
                self.modules[path] = module
                self._with_weight.setdefault(id(module._parameters.get("weight")), []).append(path)

    def sharing(self, path: str) -> list[str]:
        """Paths of the other modules whose `weight` is that of the module at `path`."""
        weight = self.modules[path]._parameters.get("weight")
        return [] if weight is None else [other for other in self._with_weight[id(weight)] if other != path]


def extra_sites(config: LoraConfig, model: nn.Module, matched: Sequence[str]) -> list[SiteRequest]:
    """Everything that the fields beside `target_modules` ask for. Raises `TargetError`."""
    wants_more = config.target_parameters or config.trainable_token_indices or config.ensure_weight_tying
    if not wants_more and config.bias == "none":
        return []
    tree = Model(model)
    requests = [*_parameters(config, tree, matched), *_tied(config, tree, matched)]
    adapted = [*matched, *(request.path for request in requests if not request.copied)]
    requests += _tied_copies(config, tree)
    return [*requests, *_rows(config, tree, adapted), *bias_sites(config, model, adapted)]


def _parameters(config: LoraConfig, tree: Model, matched: Sequence[str]) -> Iterator[SiteRequest]:
    if not config.target_parameters:
        return
    matcher = NameMatcher(config.target_parameters, what="target_parameters", trusted=False)
    for path, module in tree.modules.items():
        names = [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None and matcher.matches(f"{path}.{name}" if path else name)
        ]
        if names and path in matched:
            raise TargetError(
                f"{path}: target_modules adapts the module as a whole and target_parameters its {names[0]}"
            )
        for index, name in enumerate(names):
            # Files nest the adapters of one module's parameters; the first one registered is the innermost.
            prefix = "base_layer." * (len(names) - 1 - index)
            yield SiteRequest(path, name, (name,), prefix, {FORM: PARAMETER})
    if unmatched := matcher.unmatched():
        raise TargetError(f"target_parameters: {unmatched} matches no parameter of the model")


def _tied(config: LoraConfig, tree: Model, matched: Sequence[str]) -> Iterator[SiteRequest]:
    if not config.ensure_weight_tying:
        return
    done = set(matched)
    for path in matched:
        group = tree.sharing(path)
        if any(isinstance(tree.modules[member], nn.Embedding) for member in (path, *group)):
            for member in group:
                if member not in done:
                    done.add(member)
                    yield SiteRequest(member)


def _tied_copies(config: LoraConfig, tree: Model) -> Iterator[SiteRequest]:
    """Layers tied to one that `modules_to_save` copies: their copies share the weight."""
    if not (config.ensure_weight_tying and config.modules_to_save):
        return
    matcher = NameMatcher(config.modules_to_save, what="modules_to_save", trusted=False)
    copied = [path for path in tree.modules if path and matcher.matches(path)]
    for path in copied:
        for member in tree.sharing(path):
            if member in copied:
                raise TargetError(
                    f"modules_to_save: {path} and {member} share their weight, and with ensure_weight_tying naming one "
                    "is naming both; leave one of them out"
                )
            yield SiteRequest(member, copied=True, tied_to=path)


def _rows(config: LoraConfig, tree: Model, adapted: Sequence[str]) -> Iterator[SiteRequest]:
    if not config.trainable_token_indices:
        return
    owners = list(_owners(config, tree))
    own = {path for path, _ in owners}
    for path, indices in owners:
        if path in adapted:
            raise TargetError(f"{path}: target_modules and trainable_token_indices both name it; leave one of them out")
        meta = {FORM: ROWS, "indices": indices}
        yield SiteRequest(path, "token_adapter", ("weight",), "token_adapter.", meta)
        if not isinstance(tree.modules[path], nn.Embedding):
            continue
        for member in tree.sharing(path):
            if member not in own:
                meta = {FORM: TIED_ROWS, "indices": indices, "of": path}
                yield SiteRequest(member, "token_adapter", ("weight",), "token_adapter.", meta)


def _owners(config: LoraConfig, tree: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and indices for every layer that `trainable_token_indices` names."""
    wanted = config.trainable_token_indices
    if isinstance(wanted, tuple):
        yield tree_path_of_input_embedding(tree), wanted
        return
    for name, indices in (wanted or {}).items():
        matcher = NameMatcher((name,), what="trainable_token_indices", trusted=False)
        found = [path for path in tree.modules if path and matcher.matches(path)]
        if not found:
            raise TargetError(f"trainable_token_indices: {name!r} matches no module of the model")
        yield from ((path, indices) for path in found)


def tree_path_of_input_embedding(tree: Model) -> str:
    """Where the model's input embedding is. Raises `TargetError` for a model that has none."""
    getter = getattr(tree.model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        embedding = None
    embedding = getattr(embedding, "base_layer", embedding)  # it may carry an adapter already
    for path, module in tree.modules.items():
        if module is embedding or (embedding is None and path.rpartition(".")[2] == "embed_tokens"):
            return path
    raise TargetError(
        "trainable_token_indices: the model does not say which module is its input embedding; give a mapping from the "
        "module's name to the indices"
    )

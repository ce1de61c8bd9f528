"""Backbones of transformers: where they are, a call's arguments by name, and outputs without the positions in front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .architectures import role_paths
from .calls import parameter_names
from .counted_cache import CACHE_NAMES
from .errors import RequestError, TargetError
from .layers import SiteRequest
from .tree import walk

if TYPE_CHECKING:
    from .link import Link


def backbone_sites(model: nn.Module) -> list[SiteRequest]:
    """Where virtual tokens go in a model of transformers.

    The backbone; in encoder-decoder models the encoder, and the decoder with `meta["role"]` "decoder" (elsewhere it
    is "backbone" or "encoder"). Raises `TargetError` where the model does not say what its backbone is.
    """
    paths = {id(module): path for path, module in reversed(walk(model).modules)}

    def path_of(module: Any) -> str:
        return paths[id(getattr(module, "base_layer", module))]

    asked: Any = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder, decoder = asked.get_encoder(), asked.get_decoder()
        parts = (("encoder", encoder), ("decoder", decoder))
        return [SiteRequest(path_of(part), meta={"role": role}) for role, part in parts]
    backbone = asked.get_decoder() if hasattr(model, "get_decoder") else None
    if backbone is None or backbone is model:
        backbone = getattr(model, "base_model", None)
    if not isinstance(backbone, nn.Module) or id(getattr(backbone, "base_layer", backbone)) not in paths:
        raise TargetError(
            f"{type(model).__name__} does not say which module is its backbone (get_decoder, base_model); name the "
            "site yourself"
        )
    return [SiteRequest(path_of(backbone), meta={"role": "backbone"})]


def prefix_sites(model: nn.Module, *, cross: bool = False) -> list[SiteRequest]:
    """Where key/value prefixes go in a model of transformers.

    Its attention modules, with `meta` of `role` "attention", `index` (counted from 0), `kv_heads`, `head_dim`, `cross`
    and `encoder` (whether it is in an encoder beside a decoder); and, with the role "positions" and `encoder`, the
    modules at which the input's positions are shifted (`PositionShift`), if the model has positions. `cross` adds the
    attention to the encoder.

    Raises `TargetError` where the model's type is not known to `peft_core.architectures`.
    """
    tree = walk(model)
    backbones = {request.path: request.meta["role"] for request in backbone_sites(model)}
    encoder = next((path for path, role in backbones.items() if role == "encoder"), None)

    def inside(path: str) -> bool:
        return encoder is not None and (path == encoder or path.startswith(f"{encoder}."))

    requests: list[SiteRequest] = []
    for path in role_paths(model, "attention"):
        across = any(word in path.rpartition(".")[2].lower() for word in ("cross", "encdec", "encoder_attn"))
        if across and not cross:
            continue
        heads, width = _shape_of_keys(tree.module(path) or model, model)
        meta = {"index": len(requests), "kv_heads": heads, "head_dim": width, "cross": across}
        requests.append(SiteRequest(path, meta={"role": "attention", "encoder": inside(path), **meta}))
    positions = [path for path, _ in tree.modules if path.rpartition(".")[2] == "embed_positions"]
    if not positions:
        at = [(path, module) for path, module in tree.modules if path in backbones]
        positions = [path for path, module in at if "position_ids" in parameter_names(type(module).forward)]
    shifts = [SiteRequest(p, part="positions", meta={"role": "positions", "encoder": inside(p)}) for p in positions]
    return requests + shifts


def _shape_of_keys(module: nn.Module, model: nn.Module) -> tuple[int, int]:
    """How many heads an attention's keys have, and their dimension: what the module says, or else its config."""
    config: Any = attribute_of(module, ("config",)) or getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = attribute_of(module, ("num_heads", "n_heads", "num_attention_heads")) or config.num_attention_heads
    width = attribute_of(module, ("head_dim", "key_value_proj_dim", "attention_head_size", "head_size"))
    width = width or getattr(config, "head_dim", None) or config.hidden_size // heads
    own = attribute_of(module, ("num_key_value_heads", "num_kv_heads", "kv_heads"))
    own = own or getattr(config, "num_key_value_heads", None)
    if getattr(config, "new_decoder_architecture", False):  # Falcon caches keys once for every head
        own = heads
    if own is None and getattr(config, "multi_query", False):
        own = 1
    return int(own or heads), int(width)


def attribute_of(module: nn.Module, names: Sequence[str]) -> Any:
    """The first of these attributes that the module, or one inside, has as its own."""
    for name in names:
        for child in module.modules():
            if vars(child).get(name) is not None:
                return vars(child)[name]
    return None


def cache_argument(names: Sequence[str]) -> str:
    """What the cache is called among a forward's arguments; empty where it takes none."""
    return next((name for name in CACHE_NAMES if name in names), "")


def visible_of(numbers: Sequence[int], index: Tensor) -> Tensor:
    """Which of max(numbers) positions each row has, the last ones: (rows, n). `index` -1 stands for none."""
    n = max(numbers)
    own = torch.tensor([0, *numbers], device=index.device)[index + 1]
    return torch.arange(n, device=index.device) >= n - own[:, None]


def of_rows(base: Link, index: Tensor, count: int) -> list[Link]:
    """What `base` is for the rows of each of `count` adapters, those with its number in `index`.

    By these links `call.rows` gives an adapter the entries of its own rows.
    """
    call = base.request.call
    if call is None:
        return [base] * count
    rows = [(index == at).nonzero()[:, 0] for at in range(count)]
    requests = [replace(base.request, call=call.of_rows(own, len(index))) for own in rows]
    return [type(base)(base._site, base.inner, request, base._known) for request in requests]


def first_position(module: nn.Module) -> int:
    """The position that a backbone gives the first token: after that of padding, where padding has one (RoBERTa)."""
    embeddings: Any = getattr(module, "embeddings", None)
    own = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
    return int(embeddings.padding_idx) + 1 if own else 0


PACKED = ("cu_seq_lens_q", "cu_seqlens_q")


def refuse_packed(given: Mapping[str, Any], where: str) -> None:
    """Raise `RequestError` for rows that hold several sequences each, told apart by where they begin."""
    if any(given.get(name) is not None for name in PACKED):
        raise RequestError(
            f"{where or 'the model'}: the rows hold several sequences each (padding-free batches), and what is put "
            "in front of a row would be in front of its first sequence alone; give one sequence for each row"
        )


def bind(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, the cache under the name that the forward gives it."""
    given = dict(zip(names, args, strict=False))
    given.update(kwargs)
    name = cache_argument(names)
    for other in CACHE_NAMES:
        if name and other != name and other not in names and other in given:
            given[name] = given.pop(other)
    return given


class Places:
    """Where `n` virtual positions lie in each row: first, or after the padding on the row's left.

    Windows of attention count columns. Between the padding and the input, virtual positions are as near to the input
    in a padded row as they are in that row alone.
    """

    def __init__(self, n: int, left: Tensor | None = None) -> None:
        self.n = n
        self.left = left
        """(batch,), how many positions of padding come first; None where that makes no difference."""

    def put(self, joined: Tensor, dim: int, batch_dim: int = 0) -> Tensor:
        """Move what stands first along `dim` to its place."""
        if self.left is None:
            return joined
        at, left = torch.arange(joined.shape[dim], device=joined.device), self.left[:, None]
        inside = torch.where(at < left + self.n, at - left, at)
        return _gather(joined, torch.where(at < left, at + self.n, inside), dim, batch_dim)

    def take_off(self, value: Tensor, dim: int) -> Tensor:
        """Leave the virtual positions along `dim` out."""
        if self.left is None:
            return value.narrow(dim, self.n, value.shape[dim] - self.n)
        at = torch.arange(value.shape[dim] - self.n, device=value.device)
        return _gather(value, at + self.n * (at >= self.left[:, None]), dim, 0)


def _gather(value: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """`value` along `dim` at the `index` (batch, size) of each row of the batch."""
    dim, batch_dim = dim % value.dim(), batch_dim % value.dim()
    shape, ones = list(value.shape), [1] * value.dim()
    shape[batch_dim] = ones[batch_dim] = index.shape[0]
    rows = value.expand(shape)
    shape[dim] = ones[dim] = index.shape[1]
    return rows.gather(dim, index.view(ones).expand(shape))


class Cut:
    """Takes virtual positions off what a backbone returns. `total` is the length with them, where they are new."""

    def __init__(self, places: Places, total: int | None) -> None:
        self.places = places
        self.total = total

    def output(self, out: Any, module: nn.Module) -> Any:
        if isinstance(out, Tensor):
            return self.states(out)
        if isinstance(out, Mapping):
            for name in tuple(out):
                if name == "last_hidden_state" or name == "hidden_states":
                    out[name] = self.each(out[name], self.states)  # type: ignore[index]
                elif name == "attentions":
                    out[name] = self.each(out[name], self.scores)  # type: ignore[index]
                elif name == "cross_attentions":
                    out[name] = self.each(out[name], self.queries)  # type: ignore[index]
            pooler = getattr(module, "pooler", None)
            if self.total is not None and out.get("pooler_output") is not None and pooler is not None:
                out["pooler_output"] = pooler(out["last_hidden_state"])  # type: ignore[index]
            return out
        if isinstance(out, tuple) and not hasattr(out, "_fields"):
            return tuple(self.each(value, self.by_shape) for value in out)
        return out

    def each(self, value: Any, cut: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, tuple):
            return tuple(self.each(one, cut) for one in value)
        return cut(value) if isinstance(value, Tensor) else value

    def states(self, value: Tensor) -> Tensor:
        """(batch, length, d)"""
        return value if self.total is None else self.places.take_off(value, 1)

    def scores(self, value: Tensor) -> Tensor:
        """(batch, heads, queries, keys)"""
        return self.places.take_off(self.queries(value), -1)

    def queries(self, value: Tensor) -> Tensor:
        """(batch, heads, queries, keys of another sequence)"""
        return value if self.total is None else self.places.take_off(value, -2)

    def by_shape(self, value: Tensor) -> Tensor:
        if value.dim() == 3 and value.shape[1] == self.total:
            return self.states(value)
        if value.dim() == 4:
            return self.scores(value) if value.shape[-1] == self.total else self.queries(value)
        return value

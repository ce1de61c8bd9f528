"""Key/value prefixes: an adapter that gives an attention module keys and values in front of its own.

The author of a method gives them. The core hands the attention module something that looks like a cache and puts them
in front of what the real cache returns, so that the user's cache never holds them, and the same works without a cache,
in training and under activation checkpointing. Masks get as many visible columns; positions of the input are shifted
by a companion, `PositionShift`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, as_compute
from .backbones import attribute_of, bind, cache_argument, first_position, of_rows, refuse_packed, visible_of
from .calls import parameter_names
from .counted_cache import own_part
from .errors import RequestError
from .layers import BaseLayer
from .masks import additive, extended, is_causal

if TYPE_CHECKING:
    from .link import Link

MASK_NAMES = ("attention_mask", "mask")
LENGTHS = ("cache_length", "past_key_values_length")


class PrefixAdapter(Adapter):
    """Keys and values in front of an attention module's own. Write `key_values`, and set `num_virtual_tokens`.

    The site is an attention module of transformers: one that takes a cache and calls its `update`. `prefix_sites` finds
    them, with the number of their key heads and their dimension. In a cross attention, set `cross`.
    """

    num_virtual_tokens: int
    """How many there are. Set it in `__init__`."""

    cross: bool = False
    """Whether the module attends to another sequence, whose keys are cached apart."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        self.starts_as_base = False
        self._names = parameter_names(type(layer.module).forward)
        self._cache = cache_argument(self._names)
        self._mask = next((name for name in MASK_NAMES if name in self._names), "")
        if not self._cache or not self._mask:
            raise layer.refuse(
                "keys and values reach an attention module through its cache, and its mask must be extended; this "
                f"module's forward takes {list(self._names)}"
            )
        if self._mask == "attention_mask" and "position_bias" in self._names:
            raise layer.refuse("its mask is true where nothing is seen (as MPT's), which cannot be extended safely")
        self._causal = is_causal(layer.module)

    def key_values(self, batch: int, base: Link) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch or 1, key heads, n, head dimension), as the cache would hold them."""
        raise NotImplementedError(f"{type(self).__name__} must define key_values(batch, base)")

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        if len(set(base.request.rows or ())) > 1:
            raise RequestError(
                f"{self.layer.path}: the adapters of the batch's rows are of different kinds here, or several to a "
                "row; call the model once for each"
            )
        given = bind(self._names, args, kwargs)
        keys, values = self.key_values(given[self._names[0]].shape[0], base)
        return self._run(keys, values, None, base, given)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """One call for rows with different adapters, or with none, which may have different numbers of positions."""
        first: PrefixAdapter = adapters[0]
        given = bind(first._names, args, kwargs)
        numbers = [0, *(adapter.num_virtual_tokens for adapter in adapters)]
        n = max(numbers)
        order = torch.cat([(index == at).nonzero()[:, 0] for at in range(-1, len(adapters))]).argsort()
        counts = torch.bincount(index + 1, minlength=len(numbers)).tolist()
        links = of_rows(base, index, len(adapters))
        made = [a.key_values(count, own) for a, count, own in zip(adapters, counts[1:], links, strict=True)]
        joined = []
        for part in zip(*made, strict=True):
            padded = [nn.functional.pad(piece, (0, 0, n - piece.shape[2], 0)) for piece in part]
            pieces = zip([torch.zeros_like(padded[0][:1]), *padded], counts, strict=True)
            joined.append(torch.cat([p.expand(count, -1, -1, -1) for p, count in pieces]).index_select(0, order))
        return first._run(joined[0], joined[1], visible_of(numbers[1:], index), base, given)

    def _run(self, keys: Tensor, values: Tensor, visible: Tensor | None, base: Link, given: dict[str, Any]) -> Any:
        refuse_packed(given, self.layer.path)
        hidden = given[self._names[0]]
        n = keys.shape[-2]
        cache: Any = given.get(self._cache)
        pair = own_part(cache) is not cache
        real = cache if not pair else cache.cross_attention_cache if self.cross else cache.self_attention_cache
        columns = torch.ones(1, n, dtype=torch.bool, device=hidden.device) if visible is None else visible
        mask = given.get(self._mask)
        if mask is not None:
            given[self._mask] = extended(mask, columns, rows=False, causal=self._causal, where=self.layer.path)
        elif visible is not None or (self._causal and not self.cross and hidden.shape[1] > 1):
            given[self._mask] = self._explicit(hidden, real, columns, visible is not None)
        if (alibi := given.get("alibi")) is not None:
            if alibi.dim() != 3:
                raise RequestError(
                    f"{self.layer.path}: biases by distance are part of this model's mask, which cannot be extended by "
                    "keys of other distances"
                )
            given["alibi"] = _more_alibi(alibi, n, hidden.shape[0])
        prefix = PrefixCache(real, keys, values, self.layer.path)
        given[self._cache] = _with_part(cache, prefix, self.cross) if pair else prefix
        return base(**given)

    def _explicit(self, hidden: Tensor, cache: Any, columns: Tensor, uneven: bool) -> Tensor | None:
        """The mask that the module would have done without, with the columns in front."""
        implementation = getattr(getattr(self.layer.module, "config", None), "_attn_implementation", None) or ""
        length, layer = hidden.shape[1], attribute_of(self.layer.module, ("layer_idx",)) or 0
        total, offset, past = length, 0, 0
        if cache is not None:
            (total, offset), past = cache.get_mask_sizes(length, layer), cache.get_seq_length(layer)
        if "flash" in implementation:  # these kernels align causal masks at the end, which leaves the front visible
            ones = torch.ones(hidden.shape[0], total, dtype=torch.bool, device=hidden.device)
            return torch.cat([columns, ones], 1) if uneven else None
        seen = torch.ones(length, total, dtype=torch.bool, device=hidden.device)
        if self._causal:
            at = torch.arange(length, device=hidden.device)[:, None] + past
            seen = torch.arange(total, device=hidden.device)[None] + offset <= at
        front = columns[:, None, None].expand(-1, 1, length, -1)
        mask = torch.cat([front, seen.expand(len(columns), 1, -1, -1)], -1)
        return mask if implementation == "sdpa" else additive(mask, hidden.dtype)


class PrefixCache:
    """What an attention module sees as its cache: the real one, or none, with keys and values in front."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor, where: str) -> None:
        self.cache = cache
        self.keys = keys
        self.values = values
        self.where = where

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far, those in front included; the real cache gets what is given, and no more."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return self._in_front(self.keys, keys), self._in_front(self.values, values)

    def get_seq_length(self, *args: Any) -> Any:
        """Positions so far, those in front included."""
        return self.keys.shape[-2] + (0 if self.cache is None else self.cache.get_seq_length(*args))

    @property
    def layers(self) -> _PrefixLayers:
        """For modules that read what was cached before."""
        return _PrefixLayers(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def _in_front(self, front: Tensor, own: Tensor) -> Tensor:
        if front.shape[1] != own.shape[1] or front.shape[3] != own.shape[3] or front.shape[0] not in (1, own.shape[0]):
            raise RequestError(
                f"{self.where}: key_values returned a tensor of shape {tuple(front.shape)}; this attention's keys and "
                f"values are (batch {own.shape[0]}, {own.shape[1]} heads, length, {own.shape[3]})"
            )
        return torch.cat([as_compute(front, own).expand(own.shape[0], -1, -1, -1), own], 2)


class _PrefixLayers:
    def __init__(self, prefix: PrefixCache) -> None:
        self.prefix = prefix

    def __getitem__(self, index: int) -> _PrefixLayer:
        return _PrefixLayer(self.prefix, self.prefix.cache.layers[index])


class _PrefixLayer:
    def __init__(self, prefix: PrefixCache, layer: Any) -> None:
        self.keys = prefix._in_front(prefix.keys, layer.keys)
        self.values = prefix._in_front(prefix.values, layer.values)


class PositionShift(Adapter):
    """The companion of prefixes: the input's positions begin at `n`, as if the prefix had the first ones.

    At a backbone that takes `position_ids`, or at a module that embeds positions and is given them, or the length of
    what came before. `prefix_sites` says where.
    """

    def __init__(self, layer: BaseLayer, num_virtual_tokens: int) -> None:
        super().__init__(layer)
        self.starts_as_base = False
        self.num_virtual_tokens = num_virtual_tokens
        self._names = parameter_names(type(layer.module).forward)
        self._length = next((name for name in LENGTHS if name in self._names), "")
        if "position_ids" not in self._names and not self._length:
            raise layer.refuse(f"positions cannot be shifted where they are not given; it takes {list(self._names)}")

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.num_virtual_tokens, base, args, kwargs)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """The same for rows with different shifts. Raises `RequestError` where positions are those of all rows."""
        shifts = torch.tensor([0, *(a.num_virtual_tokens for a in adapters)], device=index.device)[index + 1]
        first: PositionShift = adapters[0]
        positions = bind(first._names, args, kwargs).get("position_ids")
        if not first._length or (positions is not None and positions.dim() > 1):
            return first._run(shifts[:, None], base, args, kwargs)
        if bool((shifts != shifts[0]).any()):
            raise RequestError(
                f"{first.layer.path}: the rows' prefixes have different lengths, but positions are the same for all "
                "rows here; use adapters of one length in a batch, or call the model once for each"
            )
        return first._run(int(shifts[0]), base, args, kwargs)

    def _run(self, shift: Any, base: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = bind(self._names, args, kwargs)
        positions = given.get("position_ids")
        if positions is None and self._length:
            given[self._length] = given.get(self._length, 0) + shift
            return base(**given)
        if positions is None:
            positions = self._positions(given)
        given["position_ids"] = positions + shift
        return base(**given)

    def _positions(self, given: dict[str, Any]) -> Tensor:
        """The positions that the backbone would have made itself."""
        ids, embedded = given.get(self._names[0]), given.get("inputs_embeds")
        source = ids if embedded is None else embedded
        if source is None:
            raise RequestError(f"{self.layer.path}: the backbone was called with neither input_ids nor inputs_embeds")
        cache = given.get(cache_argument(self._names))
        past = 0 if cache is None else cache.get_seq_length()
        embeddings: Any = getattr(self.layer.module, "embeddings", None)
        # Where padding has a position of its own (RoBERTa), the others begin after it.
        if ids is not None and hasattr(embeddings, "create_position_ids_from_input_ids"):
            made: Tensor = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
            return made + past
        return (torch.arange(source.shape[1], device=source.device) + past + first_position(self.layer.module))[None]


def _with_part(pair: Any, prefix: PrefixCache, cross: bool) -> Any:
    """The same pair of caches, one of them with keys and values in front. What is noted on it is noted on both."""
    made: Any = object.__new__(type(pair))
    for name, value in pair.__dict__.items():
        setattr(made, name, value)
    setattr(made, "cross_attention_cache" if cross else "self_attention_cache", prefix)
    return made


def _more_alibi(alibi: Tensor, n: int, batch: int) -> Tensor:
    """Biases by distance (batch * heads, 1, length), for `n` more positions before the first.

    Press et al., Train Short, Test Long (2022): head h of H, a power of two, has the slope 2^(-8 h / H); for other
    numbers the next smaller power's, then every second of the next larger one's.
    """
    heads = alibi.shape[0] // batch
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / whole) for h in range(whole)]
    slopes += [2 ** (-4 * (2 * h + 1) / whole) for h in range(heads - whole)]
    distances = torch.arange(-n, 0, device=alibi.device, dtype=torch.float32)
    front = torch.tensor(slopes, device=alibi.device)[:, None, None] * distances
    return torch.cat([front.to(alibi.dtype).repeat(batch, 1, 1), alibi], -1)

"""Virtual tokens: an adapter that puts embeddings in front of a backbone's input.

The author of a method gives the embeddings. The core embeds the input, extends masks, positions and token types, on
every call of a generation, and takes the virtual positions off the outputs again, so that heads, losses, `generate`
and caches see the user's positions.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Adapter, as_compute
from .backbones import PACKED, Cut, Places, bind, cache_argument, first_position, of_rows, refuse_packed, visible_of
from .calls import parameter_names
from .counted_cache import Entry, count_made, counted, filled_with, has_length, prepare_classes
from .errors import RequestError
from .layers import BaseLayer
from .masks import extended, has_windows, is_causal

if TYPE_CHECKING:
    from .link import Link

POSITIONS = ("position_ids", "cache_position")


class _Block(NamedTuple):
    """The virtual tokens of one call: how many, how they are made, and whose they are."""

    n: int
    make: Callable[[int], Tensor]
    key: str
    visible: Tensor | None = None
    """(batch, n), where rows have different numbers of them: the last ones of each row are its own."""


class PromptAdapter(Adapter):
    """Virtual tokens in front of a backbone's input. Write `virtual_tokens`, and set `num_virtual_tokens`.

    The site is a backbone: the module that takes `input_ids` or `inputs_embeds`, masks, positions and a cache, and
    returns hidden states (`model` in Llama, `transformer` in GPT-2, `bert`, an encoder); `backbone_sites` finds it.
    Virtual tokens have the positions 0 to n - 1, the input's are shifted by n. A `pooler_output` is computed anew,
    from the input's positions.
    """

    num_virtual_tokens: int
    """How many there are. Set it in `__init__`."""

    keep_positions: bool = False
    """Whether the outputs keep the virtual positions: for encoders whose decoder is to see them (`EncoderMask`)."""

    def __init__(self, layer: BaseLayer) -> None:
        super().__init__(layer)
        self.starts_as_base = False
        self._key = uuid.uuid4().hex  # a copy of the adapter goes on with the same caches
        self._names = parameter_names(type(layer.module).forward)
        self._causal = is_causal(layer.module)
        self._windows = has_windows(layer.module)
        self._first = first_position(layer.module)
        prepare_classes()
        if type(self).embed is PromptAdapter.embed and not hasattr(layer.module, "get_input_embeddings"):
            raise layer.refuse(
                "virtual tokens go to a backbone, which embeds its own input; this module has no get_input_embeddings "
                "(override `embed` where it can embed all the same)"
            )

    # -- what the author writes ----------------------------------------------------------------------------------

    def virtual_tokens(self, batch: int, base: Link) -> Tensor:
        """The embeddings: (n, d) for every row alike, or (batch, n, d). Their dtype becomes that of the input's."""
        raise NotImplementedError(f"{type(self).__name__} must define virtual_tokens(batch, base)")

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed the input, (batch, length) -> (batch, length, d), as the backbone would."""
        embedded: Tensor = self.layer.module.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return embedded

    # -- what the core does --------------------------------------------------------------------------------------

    @property
    def extra_positions(self) -> int:
        """Positions a cache of fixed length needs beyond the user's."""
        return self.num_virtual_tokens

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        if len(set(base.request.rows or ())) > 1:
            raise RequestError(
                f"{self.layer.path or 'the model'}: the adapters of the batch's rows are of different kinds here, or "
                "several to a row; call the model once for each"
            )
        block = _Block(self.num_virtual_tokens, lambda batch: self._rows(batch, base), self._key)
        return self._run(block, base, args, kwargs)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """One call for rows with different adapters, or with none, which may have different numbers of tokens.

        Raises `RequestError` where the adapters disagree on `keep_positions`, and where the numbers differ but the
        model counts positions by itself, for all rows alike.
        """
        first: PromptAdapter = adapters[0]
        owners = index.tolist()
        numbers = [0 if at < 0 else adapters[at].num_virtual_tokens for at in owners]
        n, uneven = max(numbers), min(numbers) < max(numbers)
        if len({adapter.keep_positions for adapter in adapters}) > 1:
            raise RequestError(f"{first.layer.path}: some adapters of the batch keep virtual positions and some do not")
        if uneven and first._counts_positions:
            raise RequestError(
                f"{first.layer.path}: the rows' adapters have {sorted(set(numbers))} virtual tokens, but positions are "
                "the same for all rows here; use adapters of one length in a batch, or call the model once for each"
            )

        def make(batch: int) -> Tensor:
            links = enumerate(of_rows(base, index, len(adapters)))
            pieces = [adapters[at]._rows(owners.count(at), own) for at, own in links]
            padded = [nn.functional.pad(piece, (0, 0, n - piece.shape[1], 0)) for piece in pieces]
            order = torch.cat([(index == at).nonzero()[:, 0] for at in range(-1, len(adapters))])
            nobody = torch.zeros_like(padded[0][:1])
            counts = [owners.count(at) for at in range(-1, len(adapters))]
            rows = [piece.expand(count, -1, -1) for piece, count in zip([nobody, *padded], counts, strict=True)]
            return torch.cat(rows).index_select(0, order.argsort())

        visible = visible_of([adapter.num_virtual_tokens for adapter in adapters], index) if uneven else None
        key = " ".join("-" if at < 0 else adapters[at]._key for at in owners)
        return first._run(_Block(n, make, key, visible), base, args, kwargs)

    @property
    def _counts_positions(self) -> bool:
        return "position_ids" not in self._names and hasattr(self.layer.module, "embed_positions")

    def _rows(self, batch: int, base: Link) -> Tensor:
        """The virtual tokens as (batch or 1, n, d), checked."""
        found = self.virtual_tokens(batch, base)
        tokens = found[None] if found.dim() == 2 else found
        if tokens.dim() != 3 or tokens.shape[0] not in (1, batch) or tokens.shape[1] != self.num_virtual_tokens:
            raise RequestError(
                f"{self.layer.path}: {type(self).__name__}.virtual_tokens returned {tuple(found.shape)}; it must be "
                f"({self.num_virtual_tokens}, d) or ({batch}, {self.num_virtual_tokens}, d)"
            )
        return tokens

    def _run(self, block: _Block, base: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = bind(self._names, args, kwargs)
        self._refuse_packed(given)
        ids: Any = given.get(self._names[0])
        embedded: Tensor | None = given.get("inputs_embeds")
        source = ids if embedded is None else embedded
        if source is None:
            raise RequestError(f"{self.layer.path}: the backbone was called with neither input_ids nor inputs_embeds")
        batch, length = source.shape[:2]
        if block.visible is not None and block.visible.shape[0] != batch:
            raise RequestError(f"{self.layer.path}: {block.visible.shape[0]} of {batch} rows have adapters")
        cache_name = cache_argument(self._names)
        cache = given.get(cache_name) if cache_name else None
        own = None if cache is None else counted(cache)
        before: tuple[Entry, ...] = () if own is None else own.filled
        if own is not None:
            self._check_cache(own, block, length)
        prepend = not before
        past = 0 if own is None else own.get_seq_length()
        places = self._places(given.get("attention_mask"), block.n, length if prepend else before[-1][2])
        self._extend(given, block, places, (batch, length, past), prepend, source.device)
        if prepend:
            embedded = self.embed(ids) if embedded is None else embedded
            virtual = as_compute(block.make(batch), embedded).expand(batch, -1, -1)
            given[self._names[0]], given["inputs_embeds"] = None, places.put(torch.cat([virtual, embedded], 1), 1)
        entry = (block.key, block.n, length)
        if own is None:
            out = base(**given)
        else:
            after = before
            own.filled = before[:-1]
            try:
                out = base(**given)
                after = before or filled_with(own, entry)
            finally:
                own.filled = after
        if not self.keep_positions:
            out = Cut(places, block.n + length if prepend else None).output(out, self.layer.module)
        return count_made(out, cache_name, entry) if own is None and cache_name else out

    def _refuse_packed(self, given: dict[str, Any]) -> None:
        """Refuse several sequences in a row. Positions tell, where nothing else separates a row's sequences."""
        refuse_packed(given, self.layer.path)
        positions = given.get("position_ids")
        if not isinstance(positions, Tensor) or given.get("attention_mask") is not None or positions.shape[-1] < 2:
            return
        if torch.compiler.is_compiling() or given.get(cache_argument(self._names)) is not None:
            return  # a graph cannot look at values; with a cache, transformers does not look for sequences either
        if bool((positions[..., 1:] < positions[..., :-1]).any()):
            refuse_packed({PACKED[0]: positions}, self.layer.path)

    def _places(self, mask: Any, n: int, first: int) -> Places:
        """Where the virtual positions lie. `first` is the length of the input that they were put to."""
        if not self._windows or self.keep_positions or not isinstance(mask, Tensor) or mask.dim() != 2:
            return Places(n)
        return Places(n, (mask.bool().cumsum(1) == 0).sum(1).clamp(max=first))

    def _check_cache(self, cache: Any, block: _Block, length: int) -> None:
        """Refuse a cache whose virtual positions are not these, and one without room for them."""
        if not cache.filled:
            if has_length(cache):
                raise RequestError(
                    f"{self.layer.path}: the cache was filled without the virtual tokens that are active now; start "
                    "with an empty cache, or go on with the adapters that were active when it was filled"
                )
            room = cache.get_max_length() if getattr(cache, "is_compileable", False) else -1
            if 0 < room < block.n + length and not any(cache.is_sliding):
                raise RequestError(
                    f"{self.layer.path}: the static cache has room for {room} positions; {length} of the input and "
                    f"{block.n} virtual tokens need {block.n + length}. Make it {block.n} longer."
                )
        elif cache.filled[-1][:2] != (block.key, block.n):
            raise RequestError(
                f"{self.layer.path}: the cache was filled with the virtual tokens of other adapters than are active "
                "now; start with an empty cache, or activate those again"
            )

    def _extend(
        self,
        given: dict[str, Any],
        block: _Block,
        places: Places,
        sizes: tuple[int, int, Any],
        prepend: bool,
        device: torch.device,
    ) -> None:
        """Extend what has an entry for each position, in place.

        `sizes` are those of the batch, of the input, and of what the cache holds besides virtual positions.
        """
        n, visible = block.n, block.visible
        batch, length, past = sizes
        if visible is not None:
            visible = visible.to(device)
            if given.get("attention_mask") is None and "attention_mask" in self._names:
                cache = given.get(cache_argument(self._names))
                size = counted(cache).get_max_length() if isinstance(past, Tensor) else past + length
                given["attention_mask"] = torch.ones(batch, size, dtype=torch.long, device=device)
        by_row = visible is not None or (prepend and places.left is not None)
        if by_row and given.get("position_ids") is None and "position_ids" in self._names:
            given["position_ids"] = (torch.arange(length, device=device) + past + self._first).expand(batch, -1)
        columns = torch.ones(1, n, dtype=torch.bool, device=device) if visible is None else visible
        if (mask := given.get("attention_mask")) is not None:
            size = mask.shape[-1] if isinstance(mask, Tensor) else 0
            mask = extended(mask, columns, rows=prepend, causal=self._causal, where=self.layer.path)
            if prepend and size > n + length:  # a mask of a static cache's length, of which n are the virtual ones
                mask = mask[..., :size]
            given["attention_mask"] = mask if places.left is None else places.put(mask, 1)
        for name in POSITIONS:
            if (positions := given.get(name)) is not None:
                moved = positions + (n if visible is None else visible.sum(1, keepdim=True))
                if prepend:
                    front = torch.arange(n, device=positions.device, dtype=positions.dtype)
                    if visible is not None:
                        front = (visible.cumsum(1) - 1).clamp(min=0)
                    front = front + self._first if name == "position_ids" else front
                    moved = torch.cat([front.expand(*moved.shape[:-1], n), moved], -1)
                    moved = places.put(moved, -1, -2) if moved.dim() > 1 else moved
                given[name] = moved
        types = given.get("token_type_ids")
        if prepend and types is not None:
            longer = torch.cat([types.new_zeros(*types.shape[:-1], n), types], -1)
            given["token_type_ids"] = places.put(longer, -1, -2)


class EncoderMask(Adapter):
    """At a decoder: its mask of the encoder's positions, extended by the `n` that an adapter there kept in front.

    A mask that covers the encoder's output as it is (one that has been extended before, or an output without virtual
    positions) is left alone.
    """

    def __init__(self, layer: BaseLayer, num_virtual_tokens: int) -> None:
        super().__init__(layer)
        self.num_virtual_tokens = num_virtual_tokens
        self._names = parameter_names(type(layer.module).forward)

    def forward(self, base: Link, *args: Any, **kwargs: Any) -> Any:
        return self._run(torch.ones(1, self.num_virtual_tokens, dtype=torch.bool), base, args, kwargs)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], index: Tensor, base: Link, *args: Any, **kwargs: Any) -> Any:
        """The same for rows whose encoders kept different numbers of positions."""
        seen = visible_of([adapter.num_virtual_tokens for adapter in adapters], index)
        first: EncoderMask = adapters[0]
        return first._run(seen, base, args, kwargs)

    def _run(self, seen: Tensor, base: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = bind(self._names, args, kwargs)
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        n = seen.shape[1]
        if mask is None and isinstance(states, Tensor) and seen.shape[0] > 1:
            mask = torch.ones(states.shape[0], states.shape[1] - n, dtype=torch.long, device=states.device)
        # Longer still, where several adapters keep positions: each has a companion here.
        if isinstance(states, Tensor) and isinstance(mask, Tensor) and states.shape[1] >= mask.shape[-1] + n:
            given["encoder_attention_mask"] = extended(mask, seen, rows=False, causal=False, where=self.layer.path)
        return base(**given)

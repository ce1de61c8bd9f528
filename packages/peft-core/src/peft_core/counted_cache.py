"""Key/value caches that hold positions their user does not count.

Virtual tokens lie in a cache like any others, in front. Whoever counts tokens outside of the backbone (`generate`
slices its input by the length of the cache) must not see them; the backbone itself, whose masks and positions come
from the cache, must. So a cache that holds some carries a list of them, and every adapter that put some there takes
its own off the list for as long as it calls on.

The cache is the user's object, of transformers' classes. Its class is exchanged for a subclass of its own, made once
per class; nothing of transformers is patched.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from .errors import RequestError

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What the argument is called, in this and earlier releases of transformers."""


Entry = tuple[str, int, int]
"""Virtual positions in a cache: whose they are, how many, and the length of the input that they were put to."""


class CountedCache:
    """What the subclass adds. Lengths leave the virtual positions of `filled` out."""

    filled: tuple[Entry, ...] = ()
    """What is in the cache and not to be seen now; innermost first."""

    @property
    def hidden(self) -> int:
        """How many positions are not to be seen now."""
        return sum(entry[1] for entry in self.filled)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """As the cache's own (a tensor in static caches), without the hidden positions."""
        length, hidden = super().get_seq_length(layer_idx), self.hidden  # type: ignore[misc]
        if not hidden:
            return length
        return length - hidden if isinstance(length, Tensor) else max(length - hidden, 0)

    def get_max_length(self, *args: Any, **kwargs: Any) -> int:
        """As the cache's own, without the hidden positions; -1 where there is no limit."""
        length: int = super().get_max_length(*args, **kwargs)  # type: ignore[misc]
        return length - self.hidden if length > 0 else length

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As the cache's own. Raises `RequestError` where virtual tokens were put in that this call does without."""
        if self.filled:
            raise RequestError(
                f"the cache holds {self.hidden} virtual tokens of an adapter that is not active in this call; go on "
                "with the adapters that were active when the cache was filled, or start with an empty cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        """As the cache's own: empty, of virtual positions too."""
        super().reset()  # type: ignore[misc]
        self.filled = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self).__mro__[2],), *reduced[2:])


_CLASSES: dict[type, type] = {}


def counted_class(cls: type) -> type:
    """The subclass of a class of caches that leaves virtual positions out of its lengths."""
    if issubclass(cls, CountedCache):
        return cls
    found = _CLASSES.get(cls)
    if found is None:
        found = _CLASSES[cls] = type(cls.__name__, (CountedCache, cls), {"__module__": __name__})
    return found


def prepare_classes() -> None:
    """Make the subclasses of transformers' caches, if it is loaded: a compiled graph cannot."""
    caches = sys.modules.get("transformers.cache_utils")
    if caches is not None:
        for cls in (caches.DynamicCache, caches.StaticCache):
            counted_class(cls)


def _rebuild(cls: type) -> Any:
    return object.__new__(counted_class(cls))


def own_part(cache: Any) -> Any:
    """The part that caches a decoder's own positions: of a pair with cross attention the first, else the cache."""
    return getattr(cache, "self_attention_cache", cache)


def counted(cache: Any) -> Any:
    """Let a cache leave virtual positions out of its lengths, in place, and return the part that does."""
    own = own_part(cache)
    if own is not None and not isinstance(own, CountedCache):
        own.__class__ = counted_class(type(own))
    return own


def counted_copy(cache: Any) -> tuple[Any, Any]:
    """The same for a cache that nobody else holds yet: the cache, and the part that counts.

    Made anew, sharing its layers, because a compiler cannot follow the exchange of a class.
    """
    own = own_part(cache)
    if isinstance(own, CountedCache):
        return cache, own
    made: Any = object.__new__(counted_class(type(own)))
    for name, value in own.__dict__.items():
        setattr(made, name, value)
    if own is cache:
        return made, made
    cache.self_attention_cache = made
    return cache, made


def filled_with(cache: Any, entry: Entry) -> tuple[Entry, ...]:
    """What a cache holds after the call that filled it. Models that checkpoint their blocks leave it empty."""
    length = cache.get_seq_length()
    return () if isinstance(length, int) and length == 0 else (*cache.filled, entry)


def count_made(out: Any, name: str, entry: Entry) -> Any:
    """Let a cache that a backbone made itself, and returns, leave the virtual positions out of its lengths."""
    if isinstance(out, MutableMapping) and out.get(name) is not None:
        out[name], own = counted_copy(out[name])
        own.filled = filled_with(own, entry)
    elif isinstance(out, tuple) and not hasattr(out, "_fields"):
        at = next((i for i, value in enumerate(out) if hasattr(value, "get_seq_length")), None)
        if at is not None:
            cache, own = counted_copy(out[at])
            own.filled = filled_with(own, entry)
            out = (*out[:at], cache, *out[at + 1 :])
    return out


def has_length(cache: Any) -> bool:
    """Whether a cache holds anything. Waits for the device only where a static cache was filled before."""
    length = cache.get_seq_length()
    return bool(length != 0)

"""Caches of one sequence, taken back behind drafts that were rejected."""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlxtp.generation.rows import leaves

# Passes that read more than this are not asked for.
ANY = 1 << 30
# Caches that cannot be cut leave tokens behind that are read again. More than so many
# are read by themselves, without drafts behind them.
MOST_PENDING = 16


class Point:
    """Where the caches of one sequence stand, so that they can be brought back there.

    Keys and values have a place for each token, and are cut. So is a full window of
    mlx-lm directly behind a pass of several tokens, which still holds what has left it
    (`RotatingKVCache._update_concat`). All others, such as states, are kept as they
    were: by reference, for mlx-lm puts new arrays in their place.

    Args:
        caches: mlx-lm's, one for each layer, before a pass.
    """

    def __init__(self, caches: Iterable[Any]) -> None:
        self._leaves = list(leaves(caches))
        self._offsets = [getattr(leaf, "offset", 0) for leaf in self._leaves]
        self._kept = [
            None if type(leaf) in CUTS else _attributes(leaf) for leaf in self._leaves
        ]

    def take_back(self, rejected: int) -> bool:
        """Take the last `rejected` tokens out of the caches.

        All layers stay at the same token: if one of them cannot be cut, all go back to
        where they stood, and what was read since and not rejected has to be read again.

        Returns: whether they were cut.
        """
        if rejected == 0:
            return True
        if not all(_can_be_cut(leaf, rejected) for leaf in self._leaves):
            self.restore()
            return False
        for leaf in self._leaves:
            _cut(leaf, rejected)
        return True

    def restore(self) -> None:
        """Bring the caches back to where they stood."""
        for leaf, offset, kept in zip(
            self._leaves, self._offsets, self._kept, strict=True
        ):
            if kept is None:
                _cut(leaf, leaf.offset - offset)
            else:
                vars(leaf).update(_copied(kept))


def tokens_at_once(caches: Iterable[Any]) -> int:
    """The most tokens that a pass may read and give each what it gets alone.

    A full window that keeps its first tokens (`max_kv_size` of mlx-lm) hides some of
    them from all but the first token of a pass.
    """
    return min(
        (
            max(1, leaf.max_size - leaf.offset)
            for leaf in leaves(caches)
            if isinstance(leaf, RotatingKVCache) and leaf.keep
        ),
        default=ANY,
    )


def _trim(cache: Any, tokens: int) -> None:
    cache.trim(tokens)


def _cut_arrays(cache: Any, tokens: int) -> None:
    """Cut a cache whose next tokens are put behind its arrays, whatever its offset."""
    if tokens:
        cache.keys = cache.keys[..., :-tokens, :]
        cache.values = cache.values[..., :-tokens, :]
        cache.offset -= tokens


# How caches that have a place for each token are cut.
CUTS: dict[type, Callable[[Any, int], None]] = {
    KVCache: _trim,
    QuantizedKVCache: _trim,
    ChunkedKVCache: _trim,
    ConcatenateKVCache: _cut_arrays,
}


def _can_be_cut(cache: Any, tokens: int) -> bool:
    if not isinstance(cache, RotatingKVCache):
        return type(cache) in CUTS
    if cache.offset < cache.max_size:
        return True
    # What is left has to be in order, and as much as the next token sees.
    is_in_order = bool(cache._idx == cache.keys.shape[2])
    left = cache._idx - tokens
    return is_in_order and bool(left >= min(cache.offset - tokens, cache.max_size))


def _cut(cache: Any, tokens: int) -> None:
    if not isinstance(cache, RotatingKVCache):
        CUTS[type(cache)](cache, tokens)
    elif cache.offset < cache.max_size:
        cache.trim(tokens)
    else:
        _cut_arrays(cache, tokens)
        cache._idx -= tokens


def _attributes(cache: Any) -> dict[str, Any]:
    """What a cache holds; what is put into the cache later does not change it."""
    return _copied(vars(cache))


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: _handle(value) for name, value in attributes.items()}


def _handle(value: Any) -> Any:
    if isinstance(value, list):
        return [_handle(x) for x in value]
    if isinstance(value, mx.array):
        # The same memory. Assignments to a part of the one leave the other as it is.
        return mx.reshape(value, value.shape)
    return value

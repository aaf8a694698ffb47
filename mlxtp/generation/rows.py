"""The caches of the requests that decode together: one row each."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    dynamic_roll,
)

# One cache of mlx-lm for each layer.
Caches = list[Any]


class Rows:
    """Caches of several requests, in the order in which they joined.

    A single row keeps the caches of one sequence, which need no mask for what fills up
    rows of other lengths; several are mlx-lm's batched caches.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.caches: Caches = []

    def join(self, ids: Sequence[str], caches: Sequence[Caches]) -> None:
        """Add a row for each of `ids`, with its caches of one sequence."""
        if not ids:
            return
        if len(self.ids) > 1:
            for cache, other in zip(self.caches, _merged(caches), strict=True):
                cache.extend(other)
        else:
            together = [self.caches, *caches] if self.ids else list(caches)
            self.caches = together[0] if len(together) == 1 else _merged(together)
        self.ids += ids

    def drop(self, ids: Sequence[str]) -> None:
        """Remove the rows of `ids`; those that are none are passed over."""
        left = [row for row, name in enumerate(self.ids) if name not in ids]
        if len(left) == len(self.ids):
            return
        if not left:
            self.caches = []
        elif len(left) == 1:
            self.caches = self._row(left[0])
        else:
            for cache in self.caches:
                cache.filter(left)
        self.ids = [self.ids[row] for row in left]

    def extract(self, name: str) -> Caches:
        """Return the caches of one row as those of one sequence, to be changed.

        Of several rows they are copies, which hold no memory of the others.
        """
        caches = copy.deepcopy(self._row(self.ids.index(name)))
        for cache in leaves(caches):
            if isinstance(cache, ArraysCache):  # mlx-lm gives a view of all rows
                cache.cache = [
                    x if x is None else mx.contiguous(x) for x in cache.cache
                ]
        return caches

    def prepare(self) -> None:
        """Make ready for a pass of more than one token a row.

        mlx-lm's mask for it takes a window to be in order, and puts it in order after.
        """
        for cache in leaves(self.caches):
            if isinstance(cache, BatchRotatingKVCache):
                cache._temporal_order()

    def take_back(self, rejected: Sequence[int]) -> None:
        """Take the last `rejected` tokens out of each of several rows.

        Directly behind a pass of more than one token, for which they were prepared.
        Those of mlx-lm's batches alone can be taken back row by row that keep keys and
        values (`can_take_back`).

        Args:
            rejected: one number a row: what fills up shorter rows of the pass counts.
        """
        if any(rejected):
            for cache in leaves(self.caches):
                _TAKE_BACK[type(cache)](cache, rejected)

    @property
    def can_take_back(self) -> bool:
        """Whether the caches of several rows can be taken back row by row."""
        return all(type(cache) in _TAKE_BACK for cache in leaves(self.caches))

    def _row(self, row: int) -> Caches:
        if len(self.ids) == 1:
            return self.caches
        return [cache.extract(row) for cache in self.caches]


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """Yield the caches that hold arrays, those within lists too."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def _merged(caches: Sequence[Caches]) -> Caches:
    """Make batched caches of those of single sequences."""
    return [layer[0].merge(list(layer)) for layer in zip(*caches, strict=True)]


def _take_back_keys(cache: BatchKVCache, rejected: Sequence[int]) -> None:
    """Move the rows so that all end where the longest does, which begins first."""
    padding: list[int] = cache.left_padding.tolist()
    lengths = [
        cache._idx - before - behind
        for before, behind in zip(padding, rejected, strict=True)
    ]
    if len({*rejected}) == 1:
        cache.trim(rejected[0])
        return
    cache._idx = max(lengths)
    new = [cache._idx - length for length in lengths]
    shifts = mx.array([a - b for a, b in zip(new, padding, strict=True)])[:, None]
    cache.keys = dynamic_roll(cache.keys, shifts, axis=2)
    cache.values = dynamic_roll(cache.values, shifts, axis=2)
    cache.left_padding, cache.offset = mx.array(new), mx.array(lengths)


def _take_back_window(cache: BatchRotatingKVCache, rejected: Sequence[int]) -> None:
    """Cut what all rows lose, and move the others to the end.

    A pass of N tokens leaves a window and N - 1 tokens before it, and what a row moves
    by is less: it stays whole.
    """
    least = min(rejected)
    cache._idx -= least
    cache._offset -= least
    keys, values = cache.keys[..., : cache._idx, :], cache.values[..., : cache._idx, :]
    shifts = mx.array([count - least for count in rejected])
    if max(rejected) > least:
        keys = dynamic_roll(keys, shifts[:, None], axis=2)
        values = dynamic_roll(values, shifts[:, None], axis=2)
    cache.keys, cache.values = keys, values
    cache.left_padding = cache.left_padding + shifts
    cache.offset = cache.offset - mx.array([*rejected])


_TAKE_BACK: dict[type, Any] = {
    BatchKVCache: _take_back_keys,
    BatchRotatingKVCache: _take_back_window,
}

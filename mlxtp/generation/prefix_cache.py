"""The prefix cache: what prompts have computed, kept under their tokens.

Rank 0 decides (`PrefixIndex`), every rank holds its slices of the caches
(`PrefixStore`). The contract between them:

- An entry is the caches of one sequence behind all of its tokens. Its key is a number
  that is never used again. `PrefixIndex.add` gives the key; then every rank puts the
  caches of exactly these tokens under it. What `add` and `free` return as dropped,
  every rank drops.
- All ranks make the same calls of `put`, `take` and `drop`, in the same order.
- An entry never changes. Who takes it gets caches of its own: they share memory with
  the entry until they are written to, since MLX's arrays are copied when they change.
- Entries whose caches can be trimmed serve every prompt that begins as they do, up to
  where the two part. Others (states, windows that have lost tokens) serve prompts that
  go on behind all of their tokens.
- A match leaves at least one token of the prompt to be read, if it is asked for so.
- Bytes are counted for each rank; the limit holds for the fullest. What was used least
  recently goes first. Used is what is found, and what is added again.
"""

import copy
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    trim_prompt_cache,
)

from mlxtp.comm.communicator import Communicator
from mlxtp.generation.prefix_files import PrefixFiles, name_of
from mlxtp.generation.rows import leaves

# A match of fewer tokens spares less than it costs: to read so few takes as long as to
# read one, and a copy of the caches has room for a whole step of 256 tokens. Nearly all
# prompts have the first tokens of the chat template in common.
LEAST_TOKENS = 16
# Bytes of a token in the index.
TOKEN_BYTES = array("I").itemsize


@dataclass(frozen=True)
class Match:
    """The entry `key` has the first `tokens` tokens of a prompt."""

    key: int
    tokens: int


@dataclass(frozen=True)
class Added:
    """What became of an addition.

    `key` is that of the new entry, None if nothing is to be kept: `dropped` are
    entries that go.
    """

    key: int | None
    dropped: list[int]


@dataclass(frozen=True)
class _Entry:
    text: bytes
    is_trimmable: bool
    nbytes: tuple[int, ...]


class PrefixIndex:
    """Which prompts the prefix cache has: rank 0's, which decides for all.

    Tokens are kept as bytes, four a token, in sorted lists: what has most tokens in
    common with a prompt stands beside its place in the order. So a look-up takes the
    logarithm of the number of entries, and compares bytes.

    Args:
        bytes_of: bytes of an entry of so many tokens on each rank, at most.
        limit_bytes: the most that all entries may take, on the fullest rank.
    """

    def __init__(
        self, bytes_of: Callable[[int], Sequence[int]], limit_bytes: int
    ) -> None:
        self._bytes_of, self._limit_bytes = bytes_of, limit_bytes
        self._keys = count()
        # In the order of their last use.
        self._entries: dict[int, _Entry] = {}
        self._key_of: dict[bytes, int] = {}
        self._trimmable: list[bytes] = []
        self._fixed: list[bytes] = []
        self.nbytes = tuple(0 for _ in bytes_of(0))

    def __len__(self) -> int:
        """The number of entries."""
        return len(self._entries)

    def find(self, tokens: Sequence[int], at_most: int | None = None) -> Match | None:
        """Find the entry that spares most tokens of a prompt, `at_most` of them.

        It counts as used. Matches below `LEAST_TOKENS` are none.
        """
        most, key = self._best(tokens, at_most)
        if most < LEAST_TOKENS:
            return None
        self._use(key)
        return Match(key, most)

    def spares(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt `find` would spare; no entry counts as used."""
        most, _ = self._best(tokens, None)
        return most if most >= LEAST_TOKENS else 0

    def _best(self, tokens: Sequence[int], at_most: int | None) -> tuple[int, int]:
        """The most tokens that an entry spares, and its key."""
        text = _text(tokens)[: None if at_most is None else at_most * TOKEN_BYTES]
        place = bisect_left(self._trimmable, text)
        beside = self._trimmable[max(0, place - 1) : place + 1]
        matches = [(_common(entry, text), self._key_of[entry]) for entry in beside]
        whole = _longest_prefix(self._fixed, text)
        if whole is not None:
            matches.append((len(whole) // TOKEN_BYTES, self._key_of[whole]))
        return max(matches, default=(0, -1))

    def add(self, tokens: Sequence[int], is_trimmable: bool) -> Added:
        """Take in an entry, if it is worth it.

        It is not if it is there, or begins an entry that can be trimmed: then that one
        counts as used. What a new entry that can be trimmed begins with goes, and so
        does what was used least recently, until all have room.
        """
        text = _text(tokens)
        covering = self._key_of.get(text, self._longer(text))
        if covering is not None:
            self._use(covering)
            return Added(None, [])
        nbytes = tuple(self._bytes_of(len(tokens)))
        if len(tokens) < LEAST_TOKENS or max(nbytes) > self._limit_bytes:
            return Added(None, [])
        dropped = []
        if is_trimmable:
            for entries in (self._trimmable, self._fixed):
                while (prefix := _longest_prefix(entries, text)) is not None:
                    dropped.append(self._key_of[prefix])
                    self.discard(dropped[-1])
        while max(map(sum, zip(self.nbytes, nbytes, strict=True))) > self._limit_bytes:
            dropped.append(next(iter(self._entries)))
            self.discard(dropped[-1])
        key = next(self._keys)
        self._entries[key] = _Entry(text, is_trimmable, nbytes)
        self._key_of[text] = key
        insort(self._trimmable if is_trimmable else self._fixed, text)
        self.nbytes = tuple(map(sum, zip(self.nbytes, nbytes, strict=True)))
        return Added(key, dropped)

    def free(self, nbytes: int) -> list[int]:
        """Drop what was used least recently, until it was `nbytes` on a rank.

        Returns: what goes, nothing where nothing is left.
        """
        dropped: list[int] = []
        before = self.nbytes
        while self._entries and max(_less(before, self.nbytes)) < nbytes:
            dropped.append(next(iter(self._entries)))
            self.discard(dropped[-1])
        return dropped

    def discard(self, key: int) -> None:
        """Drop one entry."""
        entry = self._entries.pop(key)
        del self._key_of[entry.text]
        entries = self._trimmable if entry.is_trimmable else self._fixed
        del entries[bisect_left(entries, entry.text)]
        self.nbytes = _less(self.nbytes, entry.nbytes)

    def _use(self, key: int) -> None:
        self._entries[key] = self._entries.pop(key)

    def _longer(self, text: bytes) -> int | None:
        """The key of an entry that can be trimmed to these tokens."""
        place = bisect_left(self._trimmable, text)
        following = self._trimmable[place : place + 1]
        return next((self._key_of[x] for x in following if x.startswith(text)), None)


def _text(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def _less(these: Iterable[int], those: Iterable[int]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(these, those, strict=True))


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with in common."""
    return _common(_text(one), _text(other))


def _common(one: bytes, other: bytes) -> int:
    """How many tokens two texts begin with in common."""
    least, most = 0, min(len(one), len(other)) // TOKEN_BYTES
    while least < most:
        middle = (least + most + 1) // 2
        part = slice(least * TOKEN_BYTES, middle * TOKEN_BYTES)
        if one[part] == other[part]:
            least = middle
        else:
            most = middle - 1
    return least


def _longest_prefix(entries: list[bytes], text: bytes) -> bytes | None:
    """The longest of the sorted `entries` that `text` begins with."""
    place = bisect_right(entries, text)
    if place == 0:
        return None
    # No entry that comes before this one has more in common with `text`.
    most = _common(entries[place - 1], text) * TOKEN_BYTES
    for entry in reversed(entries[:place]):
        if len(entry) <= most and text.startswith(entry):
            return entry
    return None


def trimmable_below(caches: Iterable[Any]) -> float:
    """How many tokens caches may have at most, and one more, to be trimmed to any.

    mlx-lm says of a cache in chunks that it can always be trimmed, and does so as far
    as the chunk goes.
    """
    return min(map(_trimmable_below, caches), default=float("inf"))


def _trimmable_below(cache: Any) -> float:
    if isinstance(cache, CacheList):
        return trimmable_below(cache.caches)
    if isinstance(cache, KVCache | QuantizedKVCache):
        return float("inf")
    if isinstance(cache, RotatingKVCache):
        return cache.max_size
    if isinstance(cache, ChunkedKVCache):
        return cache.chunk_size
    return 0


class PrefixStore:
    """A rank's caches of all entries; with `files` they are kept on disk as well."""

    def __init__(self, files: PrefixFiles | None = None) -> None:
        self._files = files
        self._tokens: dict[int, array[int]] = {}
        self._caches: dict[int, list[Any]] = {}
        self._unwritten: list[int] = []

    def __len__(self) -> int:
        """The number of entries."""
        return len(self._caches)

    def put(self, key: int, tokens: Sequence[int], caches: list[Any]) -> None:
        """Keep caches of one sequence under a key; nobody else changes them after it.

        Args:
            key: `PrefixIndex.add`'s.
            tokens: those that the caches hold, (L,).
            caches: one a layer. They have gone through a forward pass since they were
                taken, or are extracted from a batch: then they hold no memory that is
                larger than they are.
        """
        mx.eval([cache.state for cache in caches])
        self._tokens[key] = array("I", tokens)
        self._caches[key] = caches
        if self._files is not None:
            self._unwritten.append(key)

    def take(self, key: int, tokens: int) -> list[Any]:
        """Return caches of the first `tokens` tokens of an entry, to be changed."""
        caches = copy.deepcopy(self._caches[key])
        surplus = len(self._tokens[key]) - tokens
        if surplus:
            trimmed = trim_prompt_cache(caches, surplus)
            assert trimmed == surplus, (trimmed, surplus)
            for cache in leaves(caches):
                _cut(cache)
        return caches

    def drop(self, keys: Iterable[int]) -> None:
        """Forget entries, on disk too."""
        for key in keys:
            del self._caches[key]
            tokens = self._tokens.pop(key)
            if self._files is not None:
                self._unwritten = [other for other in self._unwritten if other != key]
                self._files.remove(name_of(tokens))

    @property
    def has_unwritten(self) -> bool:
        """Whether there is something for `write_one`."""
        return bool(self._unwritten)

    def write_one(self) -> bool:
        """Write one entry to disk, the oldest first; return whether there was one.

        It takes as long as the disk needs for it: for when there is nothing to do.
        """
        if self._files is None or not self._unwritten:
            return False
        key = self._unwritten.pop(0)
        caches = self._caches[key]
        tokens = self._tokens[key]
        is_trimmable = len(tokens) < trimmable_below(caches)
        self._files.write(tokens, is_trimmable, caches)
        return True

    def restore(self, comm: Communicator, index: PrefixIndex | None) -> None:
        """Read what all ranks have on disk; the rest is removed.

        Args:
            comm: the ranks.
            index: rank 0's, which takes the entries in; None on others.

        Communicates: two allgathers and a broadcast of objects.
        """
        files = self._files
        if files is None:
            return
        stored = {
            entry.name: entry
            for name in files.names()
            if (entry := files.tokens(name)) is not None
        }
        of_ranks = comm.allgather_object(list(stored))
        common = set.intersection(*map(set, of_ranks))
        entries: dict[int, str] = {}
        if index is not None:
            for name in of_ranks[0]:
                if name in common:
                    entry = stored[name]
                    added = index.add(entry.tokens, entry.is_trimmable)
                    for key in added.dropped:
                        del entries[key]
                    if added.key is not None:
                        entries[added.key] = name
        entries = comm.bcast_object(entries)
        read = {key: files.read(name) for key, name in entries.items()}
        broken = {key for key, caches in read.items() if caches is None}
        broken = set.union(*comm.allgather_object(broken))
        for key, caches in read.items():
            if key in broken:
                if index is not None:
                    index.discard(key)
            else:
                assert caches is not None
                self._tokens[key] = stored[entries[key]].tokens
                self._caches[key] = caches
        kept = {name for key, name in entries.items() if key not in broken}
        for name in files.names():
            if name not in kept:
                files.remove(name)


def _cut(cache: Any) -> None:
    """Leave out what was trimmed, so that the first write does not copy it."""
    if cache.keys is not None:
        cache.keys, cache.values = tree_map(
            lambda x: x[..., : cache.offset, :], (cache.keys, cache.values)
        )

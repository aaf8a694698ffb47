"""Caches that are taken back hold what they would without what was taken back."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlxtp.generation.rollback import ANY, Point, tokens_at_once

pytestmark = pytest.mark.once

WINDOW = 5
KINDS: dict[str, Callable[[], Any]] = {
    "keys": KVCache,
    "quantized": lambda: QuantizedKVCache(32, 8),
    "window": lambda: RotatingKVCache(WINDOW),
    "chunk": lambda: ChunkedKVCache(WINDOW),
    "joined": ConcatenateKVCache,
    "states": lambda: ArraysCache(1),
    "keys and states": lambda: CacheList(KVCache(), ArraysCache(1)),
    "window and states": lambda: CacheList(RotatingKVCache(WINDOW), ArraysCache(1)),
}


def read(cache: Any, tokens: list[int]) -> list[int]:
    """Read tokens; those that the last of them sees."""
    if isinstance(cache, CacheList):
        return [seen for inner in cache.caches for seen in read(inner, tokens)]
    if isinstance(cache, ArraysCache):
        before = [] if cache[0] is None else cache[0].tolist()
        cache[0] = mx.array([*before, *tokens])
        return cache[0].tolist()
    if isinstance(cache, ChunkedKVCache):
        cache.maybe_trim_front()
    x = mx.broadcast_to(
        mx.array(tokens, mx.float32)[None, None, :, None], (1, 1, len(tokens), 32)
    )
    keys, _ = cache.update_and_fetch(x, x)
    if isinstance(cache, QuantizedKVCache):
        keys = mx.dequantize(*keys, group_size=32, bits=8)
    seen = keys[0, 0, :, 0].tolist()
    if isinstance(cache, RotatingKVCache | ChunkedKVCache):
        # What lies behind the window is masked where it is there.
        seen = sorted(seen)[-WINDOW:]
    return [round(x) for x in seen]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4)), max_size=8
    )
)
def test_caches_go_on_from_what_was_right(
    kind: str, rounds: list[tuple[int, int, int]]
) -> None:
    """Rounds of tokens that were read, and of drafts that were right and wrong."""
    cache, known, pending = KINDS[kind](), 0, list[int]()
    for agreed, right, wrong in rounds:
        following = list(range(known + 1, known + 1 + agreed + right))
        pending += following[:agreed]
        point = Point([cache])
        read(cache, [*pending, *following[agreed:], *([99] * wrong)])
        known += agreed + right
        if point.take_back(wrong):
            pending = []
        else:
            pending += following[agreed:]
    seen = read(cache, [*pending, known + 1])
    alone = KINDS[kind]()
    for token in range(1, known + 1):
        read(alone, [token])
    assert seen == read(alone, [known + 1])


def test_a_point_outlives_single_tokens() -> None:
    """A window that was written over in place comes back, without a copy before."""
    cache = RotatingKVCache(WINDOW)
    for token in range(1, 9):
        read(cache, [token])
    point = Point([cache])
    for token in (50, 51, 52):
        read(cache, [token])
    assert not point.take_back(3)
    assert read(cache, [9]) == [5, 6, 7, 8, 9]


def test_windows_that_keep_their_first_tokens() -> None:
    """They read one token at a time when they are full, as mlx-lm's mask wants it."""
    cache = RotatingKVCache(WINDOW, keep=2)
    assert tokens_at_once([KVCache(), RotatingKVCache(WINDOW)]) == ANY
    read(cache, [1, 2, 3])
    assert tokens_at_once([KVCache(), CacheList(cache)]) == WINDOW - 3
    read(cache, [4, 5, 6])
    assert tokens_at_once([cache]) == 1

"""Rows of a batch that are taken back, each for itself: what it sees afterwards."""

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlxtp.generation.rows import Rows

pytestmark = pytest.mark.once

WINDOW = 8
LENGTHS = {"a": 3, "b": 23, "c": 1, "d": 2, "e": 1}


def keys_of(tokens: list[list[int]]) -> mx.array:
    """Keys that are the numbers of tokens: (B, N) -> (B, 1, N, 1)."""
    return mx.array(tokens, mx.float32)[:, None, :, None]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("seed", range(4))
def test_each_sees_its_own_tokens(window: int | None, seed: int) -> None:
    """All of them or a window's, behind passes of any width and what they reject."""
    draw = random.Random(seed)
    rows, known, number = Rows(), dict[str, list[int]](), 0

    def some(count: int) -> list[int]:
        nonlocal number
        number += count
        return list(range(number - count, number))

    def join(name: str) -> None:
        known[name] = some(LENGTHS[name])
        cache: Any = KVCache() if window is None else RotatingKVCache(window)
        keys = keys_of([known[name]])
        cache.update_and_fetch(keys, keys)
        rows.join([name], [[cache]])

    join("a")
    join("b")
    for turn in range(40):
        if turn in (10, 20, 25):
            join("cde"[(10, 20, 25).index(turn)])
        if turn == 30:
            rows.drop(["b"])
        assert rows.can_take_back
        (cache,) = rows.caches
        width = draw.choice([1, 2, 2, 5, 11])
        tokens = [some(width) for _ in rows.ids]
        if width > 1:
            rows.prepare()
        mask = cache.make_mask(width)
        keys, _ = cache.update_and_fetch(keys_of(tokens), keys_of(tokens))
        for at, name in enumerate(rows.ids):
            for place in range(width):
                here = mask[at, 0, place].tolist()
                values = keys[at, 0, :, 0].tolist()
                seen = {
                    int(x) for x, is_seen in zip(values, here, strict=True) if is_seen
                }
                text = [*known[name], *tokens[at][: place + 1]]
                assert seen == {*text[-(window or len(text)) :]}, (turn, name, place)
        rejected = [draw.randrange(width) for _ in rows.ids]
        if draw.random() < 0.2:
            rejected = rejected[:1] * len(rejected)
        rows.take_back(rejected)
        for at, name in enumerate(rows.ids):
            known[name] += tokens[at][: width - rejected[at]]
        assert cache.offset.tolist() == [len(known[name]) for name in rows.ids]
        (extracted,) = rows.extract(rows.ids[0])
        text = known[rows.ids[0]]
        held = extracted.keys[0, 0, : extracted._idx if window else None, 0].tolist()
        count = min(len(text), window or len(text))
        assert [int(x) for x in held[-count:]] == text[-count:]
    if window is None:
        moved = [len(known[name]) for name in rows.ids]
        assert cache._idx - max(moved) <= 11

"""Every query head has one rank, and ranks compute as much as is fair."""

from math import ceil
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyramid import sweep

from mlxtp.partition import heads
from mlxtp.partition.heads import HeadShard, head_shards
from mlxtp.partition.layouts import Fill, Part, fill
from mlxtp.partition.shares import apportion

pytestmark = pytest.mark.once

WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=16)


def assert_exact(
    num_heads: int, num_kv_heads: int, shards: tuple[HeadShard, ...]
) -> None:
    group = num_heads // num_kv_heads
    queries = []
    for shard in shards:
        assert shard.local_heads >= 1
        assert len(set(shard.kv_heads)) == shard.local_kv_heads
        widths = {stop - start for start, stop in shard.query_spans}
        assert len(widths) == 1, "grouped-query attention needs equal groups"
        for kv, (start, stop) in zip(shard.kv_heads, shard.query_spans, strict=True):
            assert kv * group <= start < stop <= (kv + 1) * group
            queries += range(start, stop)
    assert sorted(queries) == list(range(num_heads))


@given(st.integers(1, 16), st.integers(1, 16), WEIGHTS)
def test_every_query_head_has_one_rank_and_its_kv_head(
    num_kv_heads: int, group: int, shares: list[int]
) -> None:
    num_heads = num_kv_heads * group
    if len(shares) > num_heads:
        with pytest.raises(ValueError, match=f"start at most {num_heads} ranks"):
            head_shards(num_heads, num_kv_heads, tuple(shares))
        return
    assert_exact(
        num_heads,
        num_kv_heads,
        head_shards(num_heads, num_kv_heads, tuple(shares)),
    )


@given(
    st.sampled_from([(8, 2), (12, 2), (16, 1), (32, 4), (64, 8), (96, 8)]),
    st.lists(st.integers(0, 18).map(lambda n: 10**n), min_size=1, max_size=8),
)
@example((8, 2), [10**9, 1, 1, 1])
def test_shares_that_differ_by_any_factor_are_soon_dealt(
    counts: tuple[int, int], shares: list[int]
) -> None:
    tile, tried = heads._tile, 0

    def counting(*args: Any) -> Any:
        nonlocal tried
        tried += 1
        assert tried < 1000
        return tile(*args)

    with patch.object(heads, "_tile", counting):
        assert_exact(*counts, head_shards(*counts, tuple(shares)))


@pytest.mark.parametrize("num_kv_heads", sweep(range(1, 16), [1, 2, 8]))
def test_queries_are_even_when_ranks_share_kv_heads(num_kv_heads: int) -> None:
    """For every group up to 16 and the larger common ones, on up to 16 ranks."""
    for group in [*range(1, 17), 24, 32, 48, 64]:
        num_heads = num_kv_heads * group
        for ranks in range(num_kv_heads + 1, min(16, num_heads) + 1):
            shards = head_shards(num_heads, num_kv_heads, (1,) * ranks)
            assert_exact(num_heads, num_kv_heads, shards)
            largest = max(shard.local_heads for shard in shards)
            assert largest <= ceil(1.25 * num_heads / ranks)


@given(st.integers(1, 12), st.integers(1, 12), WEIGHTS)
def test_query_heads_one_by_one_make_rectangles_with_zeros(
    num_kv_heads: int, group: int, shares: list[int]
) -> None:
    """As many as the shares say, side by side; zeros stand at the ends alone."""
    num_heads = num_kv_heads * group
    if len(shares) > num_heads:
        return
    counts = apportion(num_heads, shares, 1)
    start = 0
    for count, shard in zip(
        counts,
        head_shards(num_heads, num_kv_heads, tuple(shares), by_query=True),
        strict=True,
    ):
        assert shard.query_spans.indices == list(range(start, start + count))
        start += count
        for kv, (first, stop) in zip(shard.kv_heads, shard.query_spans, strict=True):
            assert kv * group <= first < stop <= (kv + 1) * group
        pairs = tuple(zip(shard.kv_heads, shard.query_spans, strict=True))
        part = Part({"q": shard.query_spans, "kv": shard.kv_spans}, pairs)
        before, behind = part.zeros
        width, rest = divmod(part.slots("q"), part.size("kv"))
        assert rest == 0 and part.slots("q") == before + count + behind
        slots = [-1] * before + list(range(start - count, start)) + [-1] * behind
        for kv, turn in zip(shard.kv_heads, range(0, len(slots), width), strict=True):
            under = {head // group for head in slots[turn : turn + width] if head >= 0}
            assert under == {kv}


def test_zeros_stand_where_a_layout_has_queries() -> None:
    """Query heads 3 to 7 of 12 under KV heads 0, 1 and 2 of 3, at most 4 under each."""
    [_, shard, _] = head_shards(12, 3, (3, 6, 3), by_query=True)
    pairs = tuple(zip(shard.kv_heads, shard.query_spans, strict=True))
    part = Part({"q": shard.query_spans, "kv": shard.kv_spans}, pairs)
    assert [tuple(span) for span in shard.query_spans] == [(3, 4), (4, 8), (8, 9)]
    counts = {"q": 12, "kv": 3}

    def runs(layout: str, features: int) -> Fill:
        return fill(layout, features, counts, part, {"wide": 5}.__getitem__)

    assert runs("q", 24) == ((6, 12), (6, 0))  # heads of 2
    assert runs("kv", 6) == ()
    assert runs("q kv kv", 18) == ((3, 6), (3, 6))  # heads of 1
    assert runs("q kv kv q", 30) == ((3, 6), (3, 6), (3, 6), (3, 0))
    assert runs("(q kv kv)", 18) == ((3, 1 + 2 + 4 + 2 + 1), (3, 2))
    assert runs("q:wide q:1", 72) == ((15, 30), (18, 6), (3, 0))


def test_known_models_on_five() -> None:
    five = (1,) * 5
    llama_405b = head_shards(128, 8, five)
    assert [shard.local_kv_heads for shard in llama_405b] == [2, 2, 2, 1, 1]
    qwen3_235b = head_shards(64, 4, five)
    assert max(shard.local_heads for shard in qwen3_235b) <= 16
    assert [shard.local_kv_heads for shard in qwen3_235b] == [1, 1, 1, 1, 4]


def test_heads_follow_the_shares() -> None:
    shards = head_shards(64, 4, (2, 1, 1, 1, 1))
    assert_exact(64, 4, shards)
    assert shards[0].local_heads >= 1.6 * max(s.local_heads for s in shards[1:])
    assert [s.local_kv_heads for s in head_shards(8, 8, (9, 1, 1, 1))] == [
        5,
        1,
        1,
        1,
    ]

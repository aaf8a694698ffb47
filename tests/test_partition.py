"""Shards are disjoint, cover the axis, keep to granules and are as even as can be."""

from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp import partition

pytestmark = pytest.mark.once

WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=16)
EQUAL = st.integers(1, 16).map(lambda ranks: [1] * ranks)


@given(st.integers(0, 10**6), WEIGHTS)
def test_shares_are_within_one_of_their_quota(total: int, weights: list[int]) -> None:
    shares = partition.shares(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1


@given(st.integers(0, 10**6), EQUAL)
def test_equal_shares_differ_by_one_the_lower_ranks_first(
    total: int, weights: list[int]
) -> None:
    shares = partition.shares(total, weights)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@given(WEIGHTS, st.integers(0, 50), st.integers(1, 3))
def test_shares_keep_the_minimum(weights: list[int], more: int, minimum: int) -> None:
    total = minimum * len(weights) + more
    shares = partition.shares(total, weights, minimum)
    assert sum(shares) == total and min(shares) >= minimum
    if total > 0:
        with pytest.raises(ValueError, match="cannot be shared"):
            partition.shares(minimum * len(weights) - 1, weights, minimum)


@given(st.integers(0, 2000), st.sampled_from([1, 16, 32, 64, 128]), WEIGHTS)
def test_spans_are_disjoint_cover_and_keep_to_granules(
    granules: int, granule: int, weights: list[int]
) -> None:
    spans = partition.spans(granules * granule, weights, granule)
    assert [index for span in spans for index in range(*span)] == list(
        range(granules * granule)
    )
    assert all(edge % granule == 0 for span in spans for edge in span)


def test_an_axis_that_is_no_multiple_of_the_granule_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 64"):
        partition.spans(100, [1, 1], 64)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=6),
    st.integers(1, 128),
)
def test_cover_is_whole_granules_and_no_more_than_touched(
    gaps_and_lengths: list[tuple[int, int]], granule: int
) -> None:
    needed, at = [], 0
    for gap, length in gaps_and_lengths:
        needed.append((at + gap, at + gap + length))
        at += gap + length
    covered = partition.cover(needed, granule)
    touched = {index // granule for span in needed for index in range(*span)}
    assert [i for span in covered for i in range(*span)] == [
        i * granule + k for i in sorted(touched) for k in range(granule)
    ]
    assert all(a[1] < b[0] for a, b in pairwise(covered))


def assert_exact(
    num_heads: int, num_kv_heads: int, shards: tuple[partition.HeadShard, ...]
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
    num_kv_heads: int, group: int, weights: list[int]
) -> None:
    num_heads = num_kv_heads * group
    if len(weights) > num_heads:
        with pytest.raises(ValueError, match=f"start at most {num_heads} ranks"):
            partition.heads(num_heads, num_kv_heads, tuple(weights))
        return
    assert_exact(
        num_heads,
        num_kv_heads,
        partition.heads(num_heads, num_kv_heads, tuple(weights)),
    )


@pytest.mark.parametrize("num_kv_heads", range(1, 16))
def test_queries_are_even_when_ranks_share_kv_heads(num_kv_heads: int) -> None:
    """For every group up to 16 and the larger common ones, on up to 16 ranks."""
    for group in [*range(1, 17), 24, 32, 48, 64]:
        num_heads = num_kv_heads * group
        for ranks in range(num_kv_heads + 1, min(16, num_heads) + 1):
            shards = partition.heads(num_heads, num_kv_heads, (1,) * ranks)
            assert_exact(num_heads, num_kv_heads, shards)
            largest = max(shard.local_heads for shard in shards)
            assert largest <= ceil(1.25 * num_heads / ranks)


def test_known_models_on_five() -> None:
    five = (1,) * 5
    llama_405b = partition.heads(128, 8, five)
    assert [shard.local_kv_heads for shard in llama_405b] == [2, 2, 2, 1, 1]
    assert [stop - start for start, stop in partition.spans(53_248, five, 64)] == [
        granules * 64 for granules in (167, 167, 166, 166, 166)
    ]
    qwen3_235b = partition.heads(64, 4, five)
    assert max(shard.local_heads for shard in qwen3_235b) <= 16
    assert [shard.local_kv_heads for shard in qwen3_235b] == [1, 1, 1, 1, 4]


def test_heads_follow_the_weights() -> None:
    shards = partition.heads(64, 4, (2, 1, 1, 1, 1))
    assert_exact(64, 4, shards)
    assert shards[0].local_heads >= 1.6 * max(s.local_heads for s in shards[1:])
    assert [s.local_kv_heads for s in partition.heads(8, 8, (9, 1, 1, 1))] == [
        5,
        1,
        1,
        1,
    ]

"""Every query head has one rank, and ranks compute as much as is fair."""

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyramid import sweep

from mlxtp.partition.heads import HeadShard, head_shards

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

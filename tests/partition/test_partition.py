"""Shards are disjoint, cover the axis, keep to granules and are as even as can be."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp.partition import spans as partition

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


def test_a_known_width_on_five() -> None:
    """Llama 3.1 405B: 832 groups of 64."""
    assert [stop - start for start, stop in partition.spans(53_248, [1] * 5, 64)] == [
        granules * 64 for granules in (167, 167, 166, 166, 166)
    ]

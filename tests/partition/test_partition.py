"""Shards are disjoint, cover the axis, keep to granules and are as even as can be."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp.partition.shares import Share, Shares, apportion, cut_axis
from mlxtp.partition.spans import Slice, Span, Spans

pytestmark = pytest.mark.once

WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=16)
EQUAL = st.integers(1, 16).map(lambda ranks: [1] * ranks)


@given(st.integers(0, 10**6), WEIGHTS)
def test_shares_are_within_one_of_their_quota(total: int, shares: list[int]) -> None:
    counts = apportion(total, shares)
    assert sum(counts) == total
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1


@given(st.integers(0, 10**6), EQUAL)
def test_equal_shares_differ_by_one_the_lower_ranks_first(
    total: int, shares: list[int]
) -> None:
    counts = apportion(total, shares)
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(WEIGHTS, st.integers(0, 50), st.integers(1, 3))
def test_shares_keep_the_minimum(shares: list[int], more: int, minimum: int) -> None:
    total = minimum * len(shares) + more
    counts = apportion(total, shares, minimum)
    assert sum(counts) == total and min(counts) >= minimum
    if total > 0:
        with pytest.raises(ValueError, match="cannot be shared"):
            apportion(minimum * len(shares) - 1, shares, minimum)


@given(st.integers(0, 2000), st.sampled_from([1, 16, 32, 64, 128]), WEIGHTS)
def test_spans_are_disjoint_cover_and_keep_to_granules(
    granules: int, granule: int, shares: list[int]
) -> None:
    spans = cut_axis(granules * granule, shares, granule)
    assert Spans(spans).indices == list(range(granules * granule))
    assert all(edge % granule == 0 for span in spans for edge in span)


def test_an_axis_that_is_no_multiple_of_the_granule_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 64"):
        cut_axis(100, [1, 1], 64)


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
    covered = Spans(needed).aligned(granule)
    touched = {place // granule for place in Spans(needed).indices}
    assert covered.indices == [
        i * granule + k for i in sorted(touched) for k in range(granule)
    ]
    assert all(a.stop < b.start for a, b in pairwise(covered))


def test_a_known_width_on_five() -> None:
    """Llama 3.1 405B: 832 groups of 64."""
    assert [span.length for span in cut_axis(53_248, [1] * 5, 64)] == [
        granules * 64 for granules in (167, 167, 166, 166, 166)
    ]


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=5).map(
    lambda pairs: Spans((min(pair), max(pair)) for pair in pairs)
)


@given(SPANS, SPANS)
def test_intersection_and_difference_are_those_of_sets(a: Spans, b: Spans) -> None:
    """In the order of the first, with all that it repeats."""
    assert a.intersection(b).indices == [i for i in a.indices if i in set(b.indices)]
    assert a.difference(b).indices == [i for i in a.indices if i not in set(b.indices)]


@given(SPANS, st.integers(0, 60), st.integers(1, 5))
def test_spans_know_their_places(spans: Spans, by: int, factor: int) -> None:
    assert spans.length == len(spans.indices)
    assert spans.shifted(by).indices == [i + by for i in spans.indices]
    assert spans.joined().indices == spans.indices
    assert spans.merged().indices == sorted(set(spans.indices))
    assert spans.scaled(factor).indices == [
        factor * i + k for i in spans.indices for k in range(factor)
    ]
    for place in set(spans.indices):
        assert spans.indices[spans.offset(place)] == place
    with pytest.raises(ValueError, match="is in none of"):
        spans.offset(61)


def test_a_slice_is_cut_on_one_axis() -> None:
    whole = Slice((4, 6))
    rows, columns = Slice((4, 6), 0, Spans([(1, 3)])), Slice((4, 6), 1, Spans([(0, 2)]))
    assert (rows.shape, columns.shape, whole.size) == ((2, 6), (4, 2), 24)
    assert rows.on(0) == Spans([(1, 3)]) and rows.on(1) == Spans([(0, 6)])
    assert rows.union(columns) == whole
    assert rows.union(Slice((4, 6), 0, Spans([(3, 4)]))).spans == ((1, 4),)
    assert Span(1, 4).indices == range(1, 4)


def test_a_share_has_three_parts() -> None:
    assert Shares([2, 1]) == (Share.even(2), Share.even(1))
    assert str(Share.even(2)) == "2" and str(Share(2, 1, 1)) == "2/1/1"
    for wrong in [], [1, 0], [Share(1, 1, 0)]:
        with pytest.raises(ValueError, match="one positive whole number"):
            Shares(wrong)


@pytest.mark.parametrize(
    "text, shares",
    [
        ("2, 1", [2, 1]),
        ("attention=2,1/mlp=1,3", [Share(2, 1, 1), Share(1, 3, 1)]),
        ("vocabulary=2,1", [Share(1, 1, 2), Share(1, 1, 1)]),
        ("queries=7,9/mlp=1,3", [Share(7, 1, 1, True), Share(9, 3, 1, True)]),
    ],
)
def test_shares_are_written_as_they_are_read(
    text: str, shares: list[int | Share]
) -> None:
    read = Shares.parse(text)
    assert read == Shares(shares)
    assert Shares.parse(str(read)) == read


@pytest.mark.parametrize(
    "text, said",
    [
        ("1,x", "one positive whole number"),
        ("attention=1,1/mlp=1", "as many numbers"),
        ("heads=1,1", "'heads' is none of attention, mlp, vocabulary, queries"),
        ("attention=1,1/queries=1,1", "give one"),
        ("mlp=1,1/mlp=1,2", "given twice"),
        ("1,1/mlp=1,1", "a name before"),
        ("=2,1,1", "a name before '=2,1,1'"),
        ("mlp=1,0", "one positive whole number"),
    ],
)
def test_shares_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Shares.parse(text)

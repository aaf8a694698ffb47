"""Which attention heads a rank computes. Integers only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil

from mlxtp.partition.shares import apportion, cut_axis
from mlxtp.partition.spans import Span, Spans


@dataclass(frozen=True)
class HeadShard:
    """The heads of one rank.

    Args:
        kv_heads: the indices of its KV heads.
        query_spans: for each of its KV heads, the query heads that it computes under
            it. All spans have the same length, but the first and the last of a rank
            that got its query heads one by one.
    """

    kv_heads: tuple[int, ...]
    query_spans: Spans

    @property
    def kv_spans(self) -> Spans:
        """Its KV heads as spans, one each."""
        return Spans((kv, kv + 1) for kv in self.kv_heads)

    @property
    def local_kv_heads(self) -> int:
        """The number of its KV heads."""
        return len(self.kv_heads)

    @property
    def local_heads(self) -> int:
        """The number of its query heads."""
        return self.query_spans.length


@lru_cache
def head_shards(
    num_heads: int,
    num_kv_heads: int,
    shares: tuple[int, ...],
    shared_groups: bool = False,
    by_query: bool = False,
) -> tuple[HeadShard, ...]:
    """Give every rank its attention heads.

    With at most as many ranks as KV heads, each rank gets whole groups: KV heads with
    all query heads under them. With more ranks, several ranks hold the same KV head and
    split the query heads under it. A rank then gets a rectangle, some KV heads and
    equally many query heads under each, so grouped-query attention runs on it
    unchanged.

    With `shared_groups` fewer ranks split groups as well, where whole groups would be
    too uneven: in a state space what belongs to a group is small beside its heads.

    With `by_query` each rank gets query heads that lie together, as many as its share
    says, and every KV head above them.

    Raises: ValueError if there are more ranks than query heads.
    """
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads"
        )
    if num_heads < len(shares):
        raise ValueError(
            f"the model has {num_heads} query heads and the world {len(shares)} "
            f"ranks: a rank would be left without one; start at most {num_heads} ranks"
        )
    group = num_heads // num_kv_heads
    if by_query:
        return tuple(
            _neighbours(heads, group) for heads in cut_axis(num_heads, shares, 1, 1)
        )
    if len(shares) <= num_kv_heads and not (
        shared_groups and _is_uneven(num_kv_heads, shares)
    ):
        return tuple(
            HeadShard(
                tuple(heads.indices),
                Spans((kv * group, (kv + 1) * group) for kv in heads.indices),
            )
            for heads in cut_axis(num_kv_heads, shares, minimum=1)
        )
    used = [kv * group for kv in range(num_kv_heads)]
    shards = []
    for kv_heads, width in _rectangles(num_kv_heads, group, shares):
        query_spans = Spans((used[kv], used[kv] + width) for kv in kv_heads)
        shards.append(HeadShard(kv_heads, query_spans))
        for kv in kv_heads:
            used[kv] += width
    return tuple(shards)


def _neighbours(heads: Span, group: int) -> HeadShard:
    """The shard of query heads that lie together."""
    kv_heads = range(heads.start // group, -(-heads.stop // group))
    return HeadShard(
        tuple(kv_heads),
        Spans(
            heads.intersection(Span(kv * group, (kv + 1) * group)) for kv in kv_heads
        ),
    )


def _is_uneven(num_kv_heads: int, shares: tuple[int, ...]) -> bool:
    """Whether a rank gets too many of the heads where groups stay whole."""
    counts = apportion(num_kv_heads, shares, minimum=1)
    return any(
        count * sum(shares) > MOST_QUERIES * num_kv_heads * share
        for count, share in zip(counts, shares, strict=True)
    )


def tiled(shard: HeadShard, num_heads: int, num_kv_heads: int) -> Spans:
    """The query heads of a shard where query head h is under KV head h mod KV.

    The order is the one in which the rank's attention pairs them: the first query head
    under each of its KV heads, then the second under each.
    """
    group = num_heads // num_kv_heads
    firsts = [
        start - kv * group
        for kv, (start, _) in zip(shard.kv_heads, shard.query_spans, strict=True)
    ]
    width = shard.local_heads // shard.local_kv_heads
    return Spans(
        (head, head + 1)
        for turn in range(width)
        for kv, first in zip(shard.kv_heads, firsts, strict=True)
        for head in [kv + (first + turn) * num_kv_heads]
    )


Rectangle = tuple[tuple[int, ...], int]  # KV heads, query heads under each

# Query heads a rank may hold, as a multiple of its even share.
MOST_QUERIES = Fraction(5, 4)
# Rectangles to try before the limit on what a rank holds is raised. With so many the
# bound above is kept for every number of heads on up to 16 ranks (test_heads.py).
SEARCH_NODES = 2000


def _rectangles(
    num_kv_heads: int, group: int, shares: Sequence[int]
) -> list[Rectangle]:
    """Tile the heads (KV heads x `group` query heads) with a rectangle a rank.

    The limit on what a rank holds grows until there is a tiling. A query head counts as
    much as a KV head: each has two matrices of head_dim x hidden.
    """
    num_heads, num_all = num_kv_heads * group, num_kv_heads * (group + 1)
    parts = [Fraction(share, sum(shares)) for share in shares]
    # Large shares first: small ones fill what is left.
    order = sorted(range(len(shares)), key=lambda rank: -shares[rank])
    limit, step = Fraction(1), Fraction(1, 16)
    while True:
        # Shares too uneven for any tiling within the bound on queries may exceed it.
        queries = limit if limit > 4 else min(limit, MOST_QUERIES)
        most = [
            (
                max(1, ceil(queries * num_heads * part)),
                max(2, ceil(limit * num_all * part)),
            )
            for part in parts
        ]
        rectangles = _tile(num_kv_heads, group, [most[rank] for rank in order])
        if rectangles is not None:
            by_rank = dict(zip(order, rectangles, strict=True))
            return [by_rank[rank] for rank in range(len(shares))]
        # Up to the limit with which a rank may hold more: far off for a tiny share.
        further = [
            step * (count // (total * part * step) + 1)
            for part, counts in zip(parts, most, strict=True)
            for count, total in zip(counts, (num_heads, num_all), strict=True)
            if count < total
        ]
        if not further:
            raise ValueError(f"no way was found to deal heads by shares {[*shares]}")
        limit = max(limit + step, min(further))


def _tile(
    num_kv_heads: int, group: int, most: Sequence[tuple[int, int]]
) -> list[Rectangle] | None:
    """Depth-first search for a tiling.

    Rank i holds at most most[i][0] query heads, and at most most[i][1] query and
    KV heads together.
    """
    ranks = len(most)
    shapes = [
        sorted(
            (
                (kv * width, kv, width)
                for kv in range(1, num_kv_heads + 1)
                for width in range(1, group + 1)
                if kv * width <= queries and kv * (width + 1) <= both
            ),
            key=lambda shape: (-shape[0], shape[1]),
        )
        for queries, both in most
    ]
    capacity = [0] * (ranks + 1)  # of the ranks from i on
    for rank in reversed(range(ranks)):
        largest = shapes[rank][0][0] if shapes[rank] else 0
        capacity[rank] = capacity[rank + 1] + largest
    dead: set[tuple[int, tuple[int, ...]]] = set()
    nodes = 0

    def place(rank: int, left: tuple[int, ...]) -> list[Rectangle] | None:
        nonlocal nodes
        total = sum(left)
        if rank == ranks:
            return [] if total == 0 else None
        state = (rank, tuple(sorted(left)))
        hopeless = not ranks - rank <= total <= capacity[rank]
        if hopeless or state in dead or nodes > SEARCH_NODES:
            return None
        nodes += 1
        for queries, kv, width in shapes[rank]:
            if queries < total - capacity[rank + 1]:
                break
            for kv_heads in _distinct_choices(left, kv, width):
                after = tuple(
                    rest - width * (head in kv_heads) for head, rest in enumerate(left)
                )
                following = place(rank + 1, after)
                if following is not None:
                    return [(kv_heads, width), *following]
        dead.add(state)
        return None

    return place(0, (group,) * num_kv_heads)


def _distinct_choices(
    left: tuple[int, ...], kv: int, width: int
) -> Iterator[tuple[int, ...]]:
    """Choices of `kv` KV heads that have `width` query heads left, the fullest first.

    KV heads with equally many left are interchangeable: one choice stands for all.
    """
    fullest = sorted(range(len(left)), key=lambda head: (-left[head], head))
    seen = set()
    for first in range(len(left) - kv + 1):
        chosen = fullest[first : first + kv]
        rests = tuple(left[head] for head in chosen)
        if rests[-1] < width:
            return
        if rests not in seen:
            seen.add(rests)
            yield tuple(sorted(chosen))

"""Who gets which bytes of a checkpoint from where, and passes them to whom.

Every byte that some rank lacks is had by one rank, from its disk or else from the hub,
and sent on to all that lack it. Integers only, and the same on every rank.

Seen from the axis on which it is cut, a tensor is a stack of rows, each of so many
items. Slices of the first axis are one row: their bytes lie together. Others have a
part of each row. Where the parts are long each is fetched by one of those who lack it;
where they are short, bands of whole rows are, each by another rank, which keeps its
items and passes the others on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlxtp.partition.spans import Span, Spans

# The most that one move has.
MOVE_BYTES = 8 * 1024 * 1024
# About as many bytes arrive in the time that one request takes, so shorter parts get no
# request of their own. It is less where ranks fetch little, to keep them even.
REQUEST_BYTES = 256 * 1024
REQUESTS_OF_RANK = 16


@dataclass(frozen=True)
class Demand:
    """What ranks lack of a tensor, and what they have of it, in items of a row."""

    name: str
    axis: int
    rows: int
    items: int
    item_bytes: int
    lacks: tuple[Spans, ...]
    has: tuple[Spans, ...]


@dataclass(frozen=True)
class Move:
    """Items `span` of each of the `rows`, from `source` to those who lack some.

    `targets` are ranks, and which of the items each gets.
    """

    name: str
    axis: int
    rows: Span
    span: Span
    source: int
    from_hub: bool
    targets: tuple[tuple[int, Spans], ...]


def plan(demands: Sequence[Demand], *, only_root: bool = False) -> list[Move]:
    """The moves that give every rank what it lacks.

    What comes from the hub is shared out evenly among those who lack it; with
    `only_root` rank 0 fetches all.
    """
    ranks = len(demands[0].lacks) if demands else 0
    from_hub, from_disk = [0] * ranks, [0] * ranks
    total = sum(
        demand.rows * demand.item_bytes * spans.length
        for demand in demands
        for spans in demand.lacks
    )
    request = min(REQUEST_BYTES, total // max(1, ranks * REQUESTS_OF_RANK))
    moves: list[Move] = []
    # Neighbours go to one rank until they make a request.
    source, run_bytes = 0, request
    for demand in demands:
        fetched = []
        for span, lacking, having in _intervals(demand):
            if having:
                moves += _from_disk(demand, span, lacking, having, from_disk)
            else:
                fetched.append((span, lacking))
        for rows, span, targets in _bands(demand, fetched, request):
            able = [0] if only_root else [rank for rank, _ in targets]
            if run_bytes >= request or source not in able:
                source = min(able, key=lambda rank: (from_hub[rank], rank))
                run_bytes = 0
            moves.append(
                Move(demand.name, demand.axis, rows, span, source, True, targets)
            )
            size = rows.length * span.length * demand.item_bytes
            from_hub[source] += size
            run_bytes += size
    return moves


def absent_bytes(demands: Iterable[Demand]) -> int:
    """Bytes that some rank lacks and none has."""
    return sum(
        demand.rows * span.length * demand.item_bytes
        for demand in demands
        for span, _, having in _intervals(demand)
        if not having
    )


def _intervals(demand: Demand) -> Iterator[tuple[Span, list[int], list[int]]]:
    """The parts of a row that are alike, who lacks them and who has them."""
    everywhere = [*demand.lacks, *demand.has]
    edges = sorted({edge for spans in everywhere for span in spans for edge in span})
    for part in map(Span._make, pairwise(edges)):
        lacking, having = (
            [
                rank
                for rank, spans in enumerate(of_ranks)
                if any(part.intersection(span) == part for span in spans)
            ]
            for of_ranks in (demand.lacks, demand.has)
        )
        if lacking:
            yield part, lacking, having


def _from_disk(
    demand: Demand, span: Span, lacking: list[int], having: list[int], load: list[int]
) -> Iterator[Move]:
    source = min(having, key=lambda rank: (load[rank], rank))
    load[source] += demand.rows * span.length * demand.item_bytes
    targets = tuple((rank, Spans([span])) for rank in lacking)
    step = max(1, MOVE_BYTES // (span.length * demand.item_bytes))
    for first in range(0, demand.rows, step):
        rows = Span(first, min(first + step, demand.rows))
        yield Move(demand.name, demand.axis, rows, span, source, False, targets)


Band = tuple[Span, Span, tuple[tuple[int, Spans], ...]]


def _bands(
    demand: Demand, fetched: Sequence[tuple[Span, list[int]]], request: int
) -> Iterator[Band]:
    """Rows, items and for whom they are fetched: at most MOVE_BYTES each."""
    if not fetched:
        return
    shortest = min(span.length for span, _ in fetched) * demand.item_bytes
    if shortest < request:
        yield from _whole_rows(demand, fetched, request)
        return
    step = max(1, MOVE_BYTES // demand.item_bytes)
    for row in range(demand.rows):
        for (start, stop), lacking in fetched:
            for first in range(start, stop, step):
                part = Span(first, min(first + step, stop))
                targets = tuple((rank, Spans([part])) for rank in lacking)
                yield Span(row, row + 1), part, targets


def _whole_rows(
    demand: Demand, fetched: Sequence[tuple[Span, list[int]]], request: int
) -> Iterator[Band]:
    """Bands of rows from the first to the last item that is fetched of them."""
    hull = Span(fetched[0][0].start, fetched[-1][0].stop)
    by_rank: dict[int, list[Span]] = {}
    for span, lacking in fetched:
        for rank in lacking:
            by_rank.setdefault(rank, []).append(span)
    targets = tuple(
        (rank, Spans(spans).merged()) for rank, spans in sorted(by_rank.items())
    )
    row = demand.items * demand.item_bytes
    even = -(-demand.rows * row // len(targets))
    step = -(-min(max(even, request), MOVE_BYTES) // row)
    for first in range(0, demand.rows, step):
        yield Span(first, min(first + step, demand.rows)), hull, targets

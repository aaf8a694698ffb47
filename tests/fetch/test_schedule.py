"""Every byte that a rank lacks comes to it once, and with few others."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtp.fetch import schedule
from mlxtp.fetch.schedule import Demand, Move, plan
from mlxtp.partition.shares import cut_axis
from mlxtp.partition.spans import Spans

pytestmark = pytest.mark.once


def come_to(demand: Demand, moves: list[Move]) -> list[Counter[tuple[int, int]]]:
    """How often each item of each row comes to each rank."""
    come: list[Counter[tuple[int, int]]] = [Counter() for _ in demand.lacks]
    for move in moves:
        for rank, parts in move.targets:
            for row in range(*move.rows):
                for start, stop in parts:
                    assert move.span[0] <= start < stop <= move.span[1]
                    come[rank].update((row, item) for item in range(start, stop))
    return come


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    ranks = draw(st.integers(1, 5))
    rows, items = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    edges = st.lists(st.integers(0, items), min_size=2, max_size=4)

    def part() -> Spans:
        cuts = sorted(draw(edges))
        pairs = zip(cuts[::2], cuts[1::2], strict=False)
        return Spans((a, b) for a, b in pairs if a < b).merged()

    has = tuple(part() if draw(st.booleans()) else () for _ in range(ranks))
    lacks = tuple(part().difference(spans) for spans in has)
    return Demand("x", 1, rows, items, draw(st.sampled_from([1, 64])), lacks, has)


@settings(max_examples=300, deadline=None)
@given(st.lists(demands(), min_size=1, max_size=1), st.booleans())
def test_all_comes_once(given: list[Demand], only_root: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "REQUEST_BYTES", 100)
        patch.setattr(schedule, "MOVE_BYTES", 300)
        moves = plan(given, only_root=only_root)
    (demand,) = given
    for rank, come in enumerate(come_to(demand, moves)):
        wanted = {
            (row, item)
            for row in range(demand.rows)
            for start, stop in demand.lacks[rank]
            for item in range(start, stop)
        }
        assert come.keys() == wanted and set(come.values()) <= {1}
    for move in moves:
        if not move.from_hub:
            assert not Spans([move.span]).difference(demand.has[move.source])
        elif only_root:
            assert move.source == 0
        else:
            assert move.source in dict(move.targets)
        assert dict(move.targets).keys() <= set(range(len(demand.lacks)))


def llama(ranks: int, has: list[list[Spans]] | None = None) -> list[Demand]:
    """Matrices cut on either axis, an embedding and a norm, of half a byte a weight."""
    made = []
    for number, (axis, items, item_bytes, rows) in enumerate(
        [(0, 128256, 8192, 1), (0, 16384, 8192, 1), (1, 53248, 1, 8192),
         (1, 16384, 1, 8192), (0, 53248, 8192, 1), (0, 16384, 2, 1)]
    ):  # fmt: skip
        shared = number == 5
        mine = cut_axis(items, [1] * ranks, 64)
        wanted = [Spans([(0, items) if shared else span]) for span in mine]
        here = has[number] if has else [() for _ in range(ranks)]
        here += [()] * (ranks - len(here))
        lacks = tuple(
            want.difference(held) for want, held in zip(wanted, here, strict=False)
        )
        made.append(
            Demand(
                str(number), axis, rows, items, item_bytes, lacks, tuple(here[:ranks])
            )
        )
    return made


def from_hub(demands: list[Demand], moves: list[Move]) -> Counter[int]:
    """Bytes that each rank fetches."""
    by_name = {demand.name: demand for demand in demands}
    fetched: Counter[int] = Counter()
    for move in moves:
        demand = by_name[move.name]
        between = (move.rows.length - 1) * demand.items + move.span.length
        fetched[move.source] += between * demand.item_bytes * move.from_hub
    return fetched


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_each_rank_fetches_its_share(ranks: int) -> None:
    wanted = llama(ranks)
    moves = plan(wanted)
    whole = sum(demand.rows * demand.items * demand.item_bytes for demand in wanted)
    fetched = from_hub(wanted, moves)
    assert sum(fetched.values()) == whole
    assert max(fetched.values()) < 1.05 * whole / ranks
    # Columns come in bands: not a request for each row.
    assert len(moves) < 1.5 * whole / schedule.MOVE_BYTES + 6 * ranks


@pytest.mark.parametrize("ranks", [4, 3, 5, 7])
def test_another_world_moves_what_is_missing_and_no_more(ranks: int) -> None:
    """From five ranks to others: nothing from the hub while all five are there."""
    before = [list(demand.lacks) for demand in llama(5)]
    wanted = llama(ranks, [list(lacks) for lacks in before])
    moves = plan(wanted)
    lacked = sum(
        demand.rows * p.length * demand.item_bytes
        for demand in wanted
        for p in demand.lacks
    )
    moved = sum(
        m.rows.length * p.length * wanted[int(m.name)].item_bytes
        for m in moves
        for _, p in m.targets
    )
    assert moved == lacked
    # From the hub comes what no machine has; columns with what lies between them.
    gone = {
        demand.name: Spans.whole(demand.items).difference(
            s for part in demand.has for s in part
        )
        for demand in wanted
    }
    least = sum(
        demand.rows
        * (demand.items if demand.rows > 1 else gone[demand.name].length)
        * demand.item_bytes
        for demand in wanted
        if gone[demand.name]
    )
    assert sum(from_hub(wanted, moves).values()) <= least
    assert bool(least) == (ranks < 5)

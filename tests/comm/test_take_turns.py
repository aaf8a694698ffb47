"""Computations whose collectives take turns: the same results, in an order for all."""

import time
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlxtp import Communicator
from mlxtp.comm import turns
from mlxtp.comm.progress import Progress

LAYERS = 6


class Layers:
    """Computations of several layers, a sum in each; what they leave is read by others.

    Each sum has a size of its own: two that met each other would be seen.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.left = [mx.zeros(1)] * LAYERS

    def __call__(self, size: int, layers: int = LAYERS) -> mx.array:
        x = mx.full((size,), self.comm.rank + 1.0)
        for layer in range(layers):
            x = x * 0.5 + self.left[layer].mean()
            self.left[layer] = x
            total = self.comm.allreduce(x, f"layers.{layer}")
            x = mx.concatenate([total, total[:1]]) / self.comm.size
        return x


@pytest.mark.usefixtures("each_mpi")
@pytest.mark.parametrize("lengths", [(6, 6), (2, 6), (6, 2), (0, 3), (0, 0)])
def test_results_are_those_of_one_after_the_other(
    lengths: tuple[int, int], comm: Communicator
) -> None:
    """Whatever a rank evaluates first, and however much each calls."""
    plain, turns = Layers(comm), Layers(comm)
    expected = plain(100, lengths[0]), plain(7, lengths[1])
    for _ in range(2):
        turns.left = [mx.zeros(1)] * LAYERS
        got = comm.take_turns(
            lambda: turns(100, lengths[0]), lambda: turns(7, lengths[1])
        )
        after = comm.allreduce(mx.full((5,), 1.0))
        mx.eval(after if comm.rank % 2 else got)
        assert after.tolist() == [comm.size] * 5
        for a, b in zip([*got, *turns.left], [*expected, *plain.left], strict=True):
            assert mx.array_equal(a, b)


def test_what_needs_a_later_one_waits(comm: Communicator) -> None:
    """The second begins with what the first ends with: nothing is hidden, or lost."""
    ends: list[mx.array] = []

    def chain(x: mx.array) -> mx.array:
        for _ in range(4):
            x = comm.allreduce(x + 1) / comm.size
        ends.append(x)
        return x

    first, second = comm.take_turns(
        lambda: chain(mx.zeros(3)),
        lambda: chain(mx.concatenate([ends[0], ends[0]])),
    )
    assert first.tolist() == [4.0] * 3 and second.tolist() == [8.0] * 6


def test_values_that_are_read_on_the_way(comm: Communicator) -> None:
    """As by a model that looks which experts are chosen."""

    def read(size: int) -> int:
        x = comm.allreduce(mx.full((size,), 2.0))
        count = int(x[0].item())
        return comm.allreduce(mx.full((size + count,), 1.0)).size

    for _ in range(2):
        got = comm.take_turns(lambda: read(3), lambda: read(4))
        assert got == (3 + 2 * comm.size, 4 + 2 * comm.size)


def test_an_exception_leaves_ranks_in_step(comm: Communicator) -> None:
    layers = Layers(comm)

    def fail() -> mx.array:
        comm.allreduce(mx.ones(3))
        raise KeyError("model")

    with pytest.raises(KeyError):
        comm.take_turns(lambda: layers(10), fail)
    assert comm.allreduce(mx.ones(4)).tolist() == [comm.size] * 4


def test_in_a_dry_run_nothing_is_sent(comm: Communicator) -> None:
    x = mx.ones(2)
    with comm.dry_run():
        got = comm.take_turns(lambda: comm.allreduce(x), lambda: comm.allreduce(2 * x))
    assert [y.tolist() for y in got] == [[1, 1], [2, 2]]


def test_one_is_begun_of_each_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(turns.mx, "async_eval", lambda x: begun.append(x.size))

    def computation(sizes: range) -> Callable[[], int]:
        return lambda: [turns.note(mx.zeros(size)) for size in sizes] and len(sizes)

    last: list[int] = []
    prepared: list[int] = []
    done = turns.take_turns(
        computation(range(10, 15)),
        computation(range(20, 23)),
        prepared.append,
        lambda both: last.extend(x.size for x in both if x is not None),
    )
    assert begun == [10, 20, 11, 21, 12, 22, 13, 14]
    assert done == (5, 3) and prepared == [0, 1] and last == [14, 22]


def test_numbers_count_as_they_are_begun(comm: Communicator) -> None:
    """So what a rank has begun says what it has come to."""
    progress = Progress()
    progress.put_in_graph("allreduce", "")
    with progress.turns() as call:
        call(0)
        assert [progress.put_in_graph("bcast", "") for _ in range(4)] == [2, 4, 6, 8]
        call(1)
        assert [progress.put_in_graph("bcast", "") for _ in range(2)] == [3, 5]
    assert progress.put_in_graph("allreduce", "") == 9  # larger than all before


def test_what_travels_is_hidden(comm: Communicator) -> None:
    """What both send is under way before a rank that comes late has sent its part."""
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    late = comm.size - 1
    arrays = comm._arrays
    comm.barrier()
    if comm.rank == late:
        time.sleep(0.5)
    got = comm.take_turns(
        lambda: comm.allreduce(mx.full((3,), 1.0) * 2, "first"),
        lambda: comm.allreduce(mx.full((4,), 1.0) * 2, "second"),
    )
    waiting: set[str] = set()
    deadline = time.monotonic() + 0.3
    while comm.rank != late and time.monotonic() < deadline and len(waiting) < 2:
        states = [core.state() for core in arrays._cores]
        waiting = {layer for _, _, layer, seconds, _ in states if seconds >= 0}
    assert [x.tolist() for x in got] == [[2 * comm.size] * n for n in (3, 4)]
    assert comm.rank == late or waiting == {"first", "second"}

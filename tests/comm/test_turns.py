"""Computations whose collectives take turns: the same results, in an order for all."""

import time
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlxtp import Communicator
from mlxtp.comm import turns

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
def test_results_are_those_of_one_after_the_other(comm: Communicator) -> None:
    plain, turns = Layers(comm), Layers(comm)
    expected = [plain(size) for size in (100, 7, 30)]
    got = comm.take_turns([lambda size=size: turns(size) for size in (100, 7, 30)])
    after = comm.allreduce(mx.full((5,), 1.0))
    # Whatever a rank evaluates first.
    mx.eval(after if comm.rank % 2 else got)
    assert after.tolist() == [comm.size] * 5
    for a, b in zip(got, expected, strict=True):
        assert mx.array_equal(a, b)
    for a, b in zip(turns.left, plain.left, strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.usefixtures("each_mpi")
def test_some_call_less_than_others(comm: Communicator) -> None:
    plain, turns = Layers(comm), Layers(comm)
    lengths = [(40, 2), (50, LAYERS), (60, 0), (70, 3)]
    expected = [plain(*each) for each in lengths]
    for _ in range(2):
        turns.left = [mx.zeros(1)] * LAYERS
        got = comm.take_turns([lambda each=each: turns(*each) for each in lengths])
        following = comm.allreduce(mx.ones(3))
        assert following.tolist() == [comm.size] * 3
        for a, b in zip(got, expected, strict=True):
            assert mx.array_equal(a, b)
    assert comm.take_turns([]) == []


def test_what_needs_a_later_one_waits(comm: Communicator) -> None:
    """The second begins with what the first ends with: nothing is hidden, or lost."""

    def chain(x: mx.array) -> mx.array:
        for _ in range(4):
            x = comm.allreduce(x + 1) / comm.size
        return x

    ends: list[mx.array] = []
    got = comm.take_turns(
        [
            lambda: ends.append(chain(mx.zeros(3))) or ends[0],
            lambda: chain(mx.concatenate([ends[0], ends[0]])),
        ]
    )
    assert [x.tolist() for x in got] == [[4.0] * 3, [8.0] * 6]


def test_values_that_are_read_on_the_way(comm: Communicator) -> None:
    """As by a model that looks which experts are chosen."""

    def read(size: int) -> int:
        x = comm.allreduce(mx.full((size,), 2.0))
        count = int(x[0].item())
        return comm.allreduce(mx.full((size + count,), 1.0)).size

    for sizes in ([3, 4], [4, 3]):
        got = comm.take_turns([lambda size=size: read(size) for size in sizes])
        assert got == [size + 2 * comm.size for size in sizes]


def test_an_exception_leaves_ranks_in_step(comm: Communicator) -> None:
    def fail() -> mx.array:
        comm.allreduce(mx.ones(3))
        raise KeyError("model")

    layers = Layers(comm)
    with pytest.raises(KeyError):
        comm.take_turns([lambda: layers(10), fail])
    assert comm.allreduce(mx.ones(4)).tolist() == [comm.size] * 4
    with comm.dry_run():
        assert comm.take_turns([lambda: comm.allreduce(mx.ones(2)).sum().item()]) == [2]


def test_one_is_begun_of_each_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(turns.mx, "async_eval", lambda x: begun.append(x.size))

    def computation(sizes: range) -> Callable[[], int]:
        return lambda: [turns.note(mx.zeros(size)) for size in sizes] and len(sizes)

    last: list[mx.array | None] = []
    prepared: list[int] = []
    done = turns.take_turns(
        [computation(range(10, 15)), computation(range(20, 23))],
        prepared.append,
        last.append,
    )
    assert begun == [10, 20, 11, 21, 12, 22, 13, 14]
    assert done == [5, 3] and prepared == [0, 1] and last[0].size == 14


def test_numbers_count_as_they_are_begun(comm: Communicator) -> None:
    """So what a rank has begun says what it has come to."""
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    progress = comm._progress
    first = progress.number
    with progress.turns(2) as call:
        call(0)
        a = [progress.put_in_graph("allreduce", "") for _ in range(4)]
        call(1)
        b = [progress.put_in_graph("allreduce", "") for _ in range(2)]
    assert [x - first for x in a] == [1, 3, 5, 7]
    assert [x - first for x in b] == [2, 4]
    assert progress.number == first + 7  # all that come later are larger
    assert progress.put_in_graph("allreduce", "") == first + 8


def test_what_travels_hides(comm: Communicator) -> None:
    """One computes while another rank has not sent what the other waits for."""
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    if comm.rank == 0:
        time.sleep(0.3)
    begin = time.monotonic()

    def computation(size: int) -> mx.array:
        x = mx.full((size,), 1.0)
        for _ in range(2):
            x = comm.allreduce(x)
        return x

    got = comm.take_turns([lambda size=size: computation(size) for size in (3, 4)])
    seconds = time.monotonic() - begin
    mx.eval(got)
    # Both were put into the graph and begun before the first sum was there.
    assert comm.rank == 0 or seconds < 0.25

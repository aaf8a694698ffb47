"""Nonblocking sums: several under way, waited for in any order, the same bits."""

import random
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxtp import Communicator
from mlxtp.comm.allreduce import ALGORITHMS, algorithms
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.traffic import Traffic

SIZES = [1, 65, 1000, 1000, 100_003, 600_001]  # the last in several messages


@pytest.fixture
def make_arrays(comm: Communicator) -> Callable[[str], EagerCollectives]:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    from mlxtp.comm.transports.mpi import MPITransport

    return lambda allreduce: EagerCollectives(
        MPITransport(), comm._progress, Traffic(), allreduce=allreduce, measure=False
    )


def part(rank: int, number: int, size: int) -> mx.array:
    """Values whose sum depends on the order, other ones for each number."""
    values = mx.random.normal((size,), key=mx.random.key(100 * number + rank))
    return (values * 10.0 ** (rank % 3)).astype(mx.bfloat16)


def same_bits(x: mx.array, y: mx.array) -> bool:
    return x.shape == y.shape and mx.array_equal(x.view(mx.uint16), y.view(mx.uint16))


@pytest.mark.usefixtures("each_mpi")
def test_a_request_gives_what_allreduce_gives(comm: Communicator) -> None:
    x = part(comm.rank, 0, 600).reshape(2, 3, 100)
    request = comm.iallreduce(x, at="here")
    total = request.wait()
    assert total.dtype == x.dtype and same_bits(total, comm.allreduce(x))
    assert request.wait() is total


@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
def test_many_under_way(
    algorithm: str, comm: Communicator, make_arrays: Callable[[str], EagerCollectives]
) -> None:
    """Waited for in another order, with blocking collectives of equal sizes between.

    The world's own collectives, `auto`, and each algorithm of `mpi-eager`.
    """
    if algorithm not in ["auto", *algorithms(comm.size)]:
        pytest.skip(f"on {comm.size} ranks all are neighbours")
    arrays = comm if algorithm == "auto" else make_arrays(algorithm)
    parts = [part(comm.rank, number, size) for number, size in enumerate(SIZES)]
    expected = [arrays.allreduce(x, "") for x in parts]
    alike = random.Random(5)
    for turn in range(6):
        uneven = random.Random(100 * turn + comm.rank)
        requests = {}
        for number, x in enumerate(parts):
            requests[number] = arrays.iallreduce(x, "")
            time.sleep(uneven.choice([0, 0, 0.003]))
            if number % 2:
                assert same_bits(arrays.allreduce(parts[2], ""), expected[2])
        order = list(requests)
        alike.shuffle(order)
        for number in order:
            time.sleep(uneven.choice([0, 0, 0.003]))
            assert same_bits(requests[number].wait(), expected[number]), number
            sizes = [1 + rank for rank in range(comm.size)]
            joined = arrays.allgather(mx.full(sizes[comm.rank], number), sizes, "")
            assert joined.tolist() == [number] * sum(sizes)


def test_algorithms_mixed(
    comm: Communicator, make_arrays: Callable[[str], EagerCollectives]
) -> None:
    """Small and large sums under way by other algorithms do not mix their messages."""
    by_name = [make_arrays(name) for name in algorithms(comm.size)]
    x = part(comm.rank, 1, 5000)
    expected = by_name[0].allreduce(x, "")
    for shift in range(len(by_name)):
        requests = [arrays.iallreduce(x, "") for arrays in by_name * 2]
        time.sleep(0.01 * comm.rank)
        for request in requests[shift:] + requests[:shift]:
            assert same_bits(request.wait(), expected)


@pytest.mark.usefixtures("each_mpi")
def test_what_is_sent_may_be_changed_meanwhile(comm: Communicator) -> None:
    x = mx.full((100_000,), comm.rank + 1.0)
    mx.eval(x)
    request = comm.iallreduce(x)
    x += 100.0
    x[3] = 7.0
    mx.eval(x)
    total = comm.size * (comm.size + 1) / 2
    assert (np.array(request.wait()) == total).all()


@pytest.mark.usefixtures("each_mpi")
def test_results_stay(comm: Communicator) -> None:
    requests = [comm.iallreduce(mx.full((500,), k + 1.0)) for k in range(3)]
    totals = [request.wait() for request in requests]
    comm.allreduce(mx.zeros(500))
    assert [x[7].item() for x in totals] == [comm.size * (k + 1) for k in range(3)]


def test_buffers_are_kept_as_long_as_mpi_uses_them(
    make_arrays: Callable[[str], EagerCollectives],
) -> None:
    """Whether or not somebody keeps the request."""
    arrays = make_arrays("auto")
    under_way = arrays._collectives._started
    request = arrays.iallreduce(mx.ones(1000), "")
    assert len(under_way) == 1
    request.wait()
    assert not under_way


@pytest.mark.usefixtures("each_mpi")
def test_of_what_is_not_contiguous_and_of_scalars(comm: Communicator) -> None:
    x = mx.arange(24).reshape(4, 6)
    assert mx.array_equal(comm.iallreduce(x.T[1::2]).wait(), x.T[1::2] * comm.size)
    assert comm.iallreduce(mx.array(3)).wait().item() == 3 * comm.size
    assert comm.iallreduce(mx.zeros((0, 4))).wait().shape == (0, 4)


@pytest.mark.usefixtures("each_mpi")
def test_traffic(comm: Communicator) -> None:
    """Calls and bytes are counted at the start, seconds as they pass."""
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    comm.traffic.reset()
    before = comm.traffic.seconds
    request = comm.iallreduce(mx.zeros((10,), mx.bfloat16))
    assert (comm.traffic.calls, comm.traffic.bytes) == (1, 20)
    mx.eval(request.wait())
    assert (comm.traffic.calls, comm.traffic.bytes) == (1, 20)
    assert comm.is_timed and comm.traffic.seconds > before


def test_progress(
    comm: Communicator, make_arrays: Callable[[str], EagerCollectives]
) -> None:
    """Of `mpi-eager`, where the wait is a collective of its own."""
    request = make_arrays("auto").iallreduce(mx.zeros(10), at="model.layers.3")
    number = comm._progress.number
    request.wait()
    call = comm._progress.last_call()
    assert call is not None and not call.waiting
    assert str(call) == f"iallreduce {number + 1} of model.layers.3"

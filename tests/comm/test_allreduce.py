"""Sums are the same bits on every rank, whatever the algorithm."""

from collections.abc import Callable

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mlxtp import Communicator
from mlxtp.comm import allreduce as collectives
from mlxtp.comm.allreduce import ALGORITHMS, Collectives, algorithms
from mlxtp.comm.codec import GROUP_SIZE, Int8Codec, PlainCodec

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8]
SIZES = [1, 2, 7, 64, 65, 1000, 100_003]  # blocks of 64 that some ranks have none of
LARGE = 1_000_003  # several messages


@pytest.fixture(scope="module")
def make_collectives(comm: Communicator) -> Callable[..., Collectives]:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    from mlxtp.comm.transports.mpi import MPITransport

    return lambda **kwargs: Collectives(MPITransport(), **kwargs)


def part(rank: int, size: int, dtype: mx.Dtype) -> mx.array:
    """What `rank` contributes: values whose sum depends on the order."""
    values = mx.random.normal((size,), key=mx.random.key(rank)) * 10.0 ** (rank % 3)
    return values.astype(dtype)


def expected_sum(ranks: int, size: int, dtype: mx.Dtype) -> np.ndarray:
    """In rank order, in float32 for 16-bit floats, by MLX."""
    parts = [part(rank, size, dtype) for rank in range(ranks)]
    if dtype in (mx.float16, mx.bfloat16):
        parts = [x.astype(mx.float32) for x in parts]
    total = parts[0]
    for more in parts[1:]:
        total = total + more
    return plain(total.astype(dtype))


def plain(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def as_numpy(x: mx.array) -> np.ndarray:
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(x)


@pytest.mark.usefixtures("each_mpi")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce(dtype: mx.Dtype, size: int, comm: Communicator) -> None:
    total = comm.allreduce(part(comm.rank, size, dtype))
    assert total.dtype == dtype and total.shape == (size,)
    assert np.array_equal(plain(total), expected_sum(comm.size, size, dtype))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_algorithm_gives_the_same_bits(
    dtype: mx.Dtype,
    algorithm: str,
    comm: Communicator,
    make_collectives: Callable[..., Collectives],
) -> None:
    if algorithm not in algorithms(comm.size):
        pytest.skip(f"on {comm.size} ranks all are neighbours")
    sums = make_collectives()
    for size in [*SIZES, LARGE]:
        total = sums.allreduce(as_numpy(part(comm.rank, size, dtype)), algorithm)
        expected = expected_sum(comm.size, size, dtype)
        assert np.array_equal(total.astype(np.float32), expected), size


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gathers_of_unequal_parts(
    algorithm: str, comm: Communicator, make_collectives: Callable[..., Collectives]
) -> None:
    if algorithm not in algorithms(comm.size):
        pytest.skip(f"on {comm.size} ranks all are neighbours")
    gathers = make_collectives()
    counts = [(5 * rank + 3) % 7 for rank in range(comm.size)]  # rank 5 has none
    whole = np.arange(sum(counts), dtype=np.float32)
    start = sum(counts[: comm.rank])
    mine = whole[start : start + counts[comm.rank]]
    for _ in range(2):
        assert np.array_equal(gathers.allgather(mine, counts, algorithm), whole)


def test_buffers_are_given_up(
    comm: Communicator,
    make_collectives: Callable[..., Collectives],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collectives, "KEPT_BYTES", 100_000)
    sums = make_collectives()
    for size in (1000, 2000, 5000, 1000, 3000):
        for algorithm in algorithms(comm.size):
            total = sums.allreduce(np.full(size, comm.rank, np.float32), algorithm)
            assert (total == sum(range(comm.size))).all()
    assert 0 < sums._kept_bytes <= 100_000
    sums.forget()
    assert not sums._kept and not sums._kept_bytes


def test_names_of_algorithms() -> None:
    direct = ["direct-one-shot", "direct-two-shot"]
    assert algorithms(5) == list(ALGORITHMS)
    assert algorithms(3) == algorithms(5, "direct") == direct
    assert algorithms(5, "ring") == ["ring-one-shot", "ring-two-shot"]
    assert algorithms(2, "ring-one-shot") == ["direct-one-shot"]
    assert algorithms(4, "direct-two-shot") == ["direct-two-shot"]


@pytest.mark.usefixtures("each_mpi")
def test_allreduce_of_what_is_not_contiguous(comm: Communicator) -> None:
    x = mx.arange(24).reshape(4, 6).astype(mx.bfloat16)
    total = comm.allreduce(x.T[1::2])
    assert total.shape == (3, 4)
    assert np.array_equal(plain(total), plain(x.T[1::2] * comm.size))


@pytest.mark.usefixtures("each_mpi")
def test_results_are_not_overwritten_by_the_next(comm: Communicator) -> None:
    first = comm.allreduce(mx.full((100,), 1.0))
    second = comm.allreduce(mx.full((100,), 2.0))
    assert first.tolist() == [comm.size] * 100
    assert second.tolist() == [2 * comm.size] * 100


@pytest.mark.usefixtures("each_mpi")
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allgather_of_unequal_parts(
    dtype: mx.Dtype, shape: tuple[int, ...], comm: Communicator
) -> None:
    sizes = [(5 * rank + 3) % 7 for rank in range(comm.size)]  # rank 5 has none
    starts = np.cumsum([0, *sizes])
    rows = int(np.prod(shape))
    whole = mx.arange(rows * sum(sizes)).reshape(*shape, sum(sizes)).astype(dtype)
    mine = whole[..., starts[comm.rank] : starts[comm.rank + 1]]
    joined = comm.allgather(mine, sizes)
    assert joined.dtype == dtype
    assert np.array_equal(plain(joined), plain(whole))


@pytest.mark.usefixtures("each_mpi")
@pytest.mark.parametrize("dtype", [mx.uint32, mx.bfloat16, mx.bool_], ids=str)
def test_bcast(dtype: mx.Dtype, comm: Communicator) -> None:
    """Arrays of any shape; another one right behind is not taken for the first."""
    for shape in (), (0,), (3,), (2, 1, 100_000):
        for root in range(comm.size):
            before = comm.traffic.calls
            received = comm.bcast(mx.full(shape, root == comm.rank, dtype), root)
            assert mx.array_equal(received, mx.ones(shape, dtype))
            assert received.dtype == dtype
            assert comm.traffic.calls - before == (comm.size > 1)
    with comm.dry_run():
        assert comm.bcast(mx.zeros(2), 0).shape == (2,)


@pytest.mark.usefixtures("each_mpi")
def test_traffic_is_counted(comm: Communicator) -> None:
    before = comm.traffic.calls, comm.traffic.bytes
    comm.allreduce(mx.zeros((10,), mx.bfloat16))
    counted = comm.traffic.calls - before[0], comm.traffic.bytes - before[1]
    assert counted == ((0, 0) if comm.size == 1 else (1, 20))


def test_narrow_floats_are_added_in_float32() -> None:
    one, tiny = 1.0, 2.0**-8
    parts = np.array([[one], *[[tiny]] * 8], ml_dtypes.bfloat16)
    total = np.empty(1, ml_dtypes.bfloat16)
    PlainCodec(total.dtype).sum([part.view(np.uint8) for part in parts], total)
    assert total.tolist() == [1.03125]  # in bfloat16: 1.0


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_int8_on_the_wire(
    dtype: mx.Dtype, comm: Communicator, make_collectives: Callable[..., Collectives]
) -> None:
    sums = make_collectives(wire="int8")
    for size in SIZES:
        x = as_numpy(part(comm.rank, size, dtype))
        totals = [
            sums.allreduce(x, algorithm).copy() for algorithm in algorithms(comm.size)
        ]
        everyones = comm.allgather_object(totals[0].tobytes())
        assert len({total.tobytes() for total in totals} | {*everyones}) == 1
        parts = [plain(part(rank, size, dtype)) for rank in range(comm.size)]
        # Half a step of each rank's largest value, and what 16 bits round away.
        bound = sum(np.abs(values).max() / 127 / 2 for values in parts)
        rounding = 2.0**-8 * np.abs(sum(parts)).max() + 1e-5
        assert (
            np.abs(totals[0].astype(np.float32) - sum(parts)).max() < bound + rounding
        )


@pytest.mark.parametrize("size", [0, 1, GROUP_SIZE, GROUP_SIZE + 1])
def test_int8_of_zeros_and_of_what_is_no_number(size: int) -> None:
    codec, total = Int8Codec(), np.empty(size, np.float32)
    zeros = codec.encode(np.zeros(size, np.float32))
    assert zeros.size == codec.nbytes(size)
    codec.sum([zeros, zeros], total)
    assert (total == 0).all()
    if size:
        with np.errstate(invalid="ignore"):
            broken = codec.encode(np.full(size, np.nan, np.float32))
            codec.sum([zeros, broken], total)
        assert np.isnan(total).all()


def test_integers_are_not_quantized(
    comm: Communicator, make_collectives: Callable[..., Collectives]
) -> None:
    sums = make_collectives(wire="int8")
    x = np.arange(1000, dtype=np.int32)
    for algorithm in algorithms(comm.size):
        assert np.array_equal(sums.allreduce(x, algorithm), x * comm.size)

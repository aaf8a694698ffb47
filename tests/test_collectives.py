"""Sums are the same bits on every rank, whichever way they are made."""

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mlxtp import Communicator
from mlxtp.collectives import EXCHANGE_LIMIT, sum_in_rank_order

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8]
LARGE = EXCHANGE_LIMIT + 3


def part(rank: int, size: int, dtype: mx.Dtype) -> mx.array:
    """What `rank` contributes: values whose sum depends on the order."""
    values = mx.random.normal((size,), key=mx.random.key(rank)) * 10.0 ** (rank % 3)
    return values.astype(dtype)


def plain(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


@pytest.mark.parametrize("size", [1, 2, 7, 1000, LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce(dtype: mx.Dtype, size: int, comm: Communicator) -> None:
    total = comm.allreduce(part(comm.rank, size, dtype))
    assert total.dtype == dtype and total.shape == (size,)
    parts = [part(rank, size, dtype) for rank in range(comm.size)]
    if dtype in (mx.float16, mx.bfloat16):
        parts = [x.astype(mx.float32) for x in parts]
    expected = parts[0]
    for more in parts[1:]:
        expected = expected + more
    assert np.array_equal(plain(total), plain(expected.astype(dtype)))


def test_allreduce_of_what_is_not_contiguous(comm: Communicator) -> None:
    x = mx.arange(24).reshape(4, 6).astype(mx.bfloat16)
    total = comm.allreduce(x.T[1::2])
    assert total.shape == (3, 4)
    assert np.array_equal(plain(total), plain(x.T[1::2] * comm.size))


def test_results_are_not_overwritten_by_the_next(comm: Communicator) -> None:
    first = comm.allreduce(mx.full((100,), 1.0))
    second = comm.allreduce(mx.full((100,), 2.0))
    assert first.tolist() == [comm.size] * 100
    assert second.tolist() == [2 * comm.size] * 100


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


def test_traffic_is_counted(comm: Communicator) -> None:
    before = comm.traffic.calls, comm.traffic.bytes
    comm.allreduce(mx.zeros((10,), mx.bfloat16))
    counted = comm.traffic.calls - before[0], comm.traffic.bytes - before[1]
    assert counted == ((0, 0) if comm.size == 1 else (1, 20))


def test_narrow_floats_are_added_in_float32() -> None:
    one, tiny = 1.0, 2.0**-8
    parts = np.array([[one], *[[tiny]] * 8], ml_dtypes.bfloat16)
    assert sum_in_rank_order(parts).tolist() == [1.03125]  # in bfloat16: 1.0

"""Collectives in MLX's graph: bits, order, waits that end, what they do not take."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from ranks import mpirun

from mlxtp import Communicator
from mlxtp.comm.allreduce import algorithms
from mlxtp.comm.eager import EagerCollectives, memory
from mlxtp.comm.progress import Progress
from mlxtp.comm.traffic import Traffic
from mlxtp.native.build import collectives
from mlxtp.native.loader import load

DTYPES = [
    *(mx.bool_, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32),
    *(mx.int64, mx.uint64, mx.float16, mx.bfloat16, mx.float32),
]
# Nothing, a group and a bit, several messages of 512 KiB.
SIZES = [0, 1, 65, 1000, 300_001]


@pytest.fixture
def core(comm: Communicator) -> Iterator[Any]:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    core = load(collectives(), print).Core(comm._control.handle(), True)
    yield core
    core.close()


def any_bits(dtype: mx.Dtype, size: int, seed: int) -> mx.array:
    """Numbers of every kind: subnormal ones, infinities, several that are not one."""
    random = np.random.default_rng(seed)
    if dtype == mx.bool_:
        return mx.array(random.integers(0, 2, size).astype(bool))
    raw = random.integers(0, 256, size * dtype.size, np.uint8)
    return mx.array(raw).view(dtype) if size else mx.zeros(0, dtype)


def bits_of(x: mx.array) -> np.ndarray:
    """The bits of an array, with those of all that is not a number alike."""
    flat = memory(x)
    if flat.dtype == ml_dtypes.bfloat16 or flat.dtype.kind == "f":
        flat = flat.copy()
        flat[np.isnan(flat.astype(np.float32))] = np.nan
    return flat.view(np.uint8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows
def test_the_bits_of_the_eager_ones(comm: Communicator, core: Any) -> None:
    from mlxtp.comm.transports.mpi import MPITransport

    for algorithm in algorithms(comm.size):
        eager = EagerCollectives(
            MPITransport(), Progress(), Traffic(), allreduce=algorithm, measure=False
        )
        for dtype in DTYPES:
            for size in SIZES:
                x = any_bits(dtype, size, 100 * size + comm.rank)
                total = core.allreduce(x, algorithm, 1, "allreduce", "")
                expected = eager.allreduce(x, "")
                assert total.dtype == dtype and total.shape == x.shape
                assert np.array_equal(bits_of(total), bits_of(expected)), (
                    f"{algorithm}, {size} of {dtype}"
                )
        # Uneven parts, and a rank without rows.
        for rows, sizes in [((), [3, 0, 5, 1]), ((2, 3), [0, 7, 2, 4]), ((2,), [0])]:
            widths = (sizes * comm.size)[: comm.size]
            x = any_bits(mx.bfloat16, 6 * widths[comm.rank], comm.rank)
            x = x[: int(np.prod(rows)) * widths[comm.rank]].reshape(*rows, -1)
            joined = core.allgather(x, widths, algorithm, 1, "")
            assert np.array_equal(
                bits_of(joined), bits_of(eager.allgather(x, widths, ""))
            )
        for root in range(comm.size):
            x = any_bits(mx.int32, 1001, comm.rank)
            sent = core.bcast(x, root, algorithm, 1, "")
            assert mx.array_equal(sent, any_bits(mx.int32, 1001, root))


def test_arrays_with_gaps(comm: Communicator, core: Any) -> None:
    x = mx.random.normal((4, 6, 10), key=mx.random.key(comm.rank))
    for view in (x.T, x[1:, ::2, 3:7], mx.broadcast_to(x[:, :1], x.shape), x[2, 3, 4]):
        total = core.allreduce(view, "direct-one-shot", 1, "allreduce", "")
        packed = core.allreduce(
            mx.array(np.array(view)), "direct-one-shot", 2, "allreduce", ""
        )
        assert mx.array_equal(total, packed)


def test_the_order_is_that_of_the_calls(comm: Communicator, core: Any) -> None:
    """Whatever a rank evaluates first, and however its graph looks.

    Each collective has a size of its own: two that met each other would be seen.
    """
    streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(2)]

    def call(x: mx.array, number: int) -> mx.array:
        return core.allreduce(x, "direct-one-shot", number, "allreduce", "")

    for turn in range(6):
        calls = []
        for number in range(40):  # more than MLX takes in one breadth
            with mx.stream(streams[number % 2]):
                x = mx.full((number + 1,), float(comm.rank + number))
                # A rank's own work, of another length and depth on each.
                for _ in range((number * 7 + comm.rank * 5 + turn) % 6):
                    x = (x + mx.zeros((300, 1))).mean(axis=0)
                calls.append(call(x, number + 1))
        picked = list(range(40))
        if comm.rank % 2:
            picked.reverse()
        # The last is evaluated alone, or with others, or after them.
        mx.eval([calls[number] for number in picked[comm.rank :: comm.rank + 1]])
        for number in picked:
            ranks = comm.size
            expected = mx.array(ranks * (ranks - 1) / 2 + ranks * number)
            assert mx.allclose(calls[number], expected, atol=1e-2), number


def test_a_model_and_its_draft(comm: Communicator, core: Any) -> None:
    """Two models whose layers are evaluated by turns, and what nobody reads."""

    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            mx.random.seed(comm.rank)
            self.layers = [nn.Linear(width, width) for _ in range(4)]

        def __call__(self, x: mx.array) -> mx.array:
            for layer in self.layers:
                x = x + core.allreduce(layer(x), "direct-one-shot", 1, "allreduce", "")
            core.allgather(x, [x.shape[-1]] * comm.size, "direct-one-shot", 1, "")
            return x

    model, draft = Model(48), Model(16)
    seen = []
    for turn in range(5):
        x, y = mx.full((1, 48), turn + 1.0), mx.full((1, 16), turn - 1.0)
        a, b = model(x), draft(y)
        c = draft(b)
        mx.async_eval(c) if comm.rank % 2 else mx.async_eval(a)
        mx.eval((b, a, c) if comm.rank else (c, a))
        seen.append([v.tolist() for v in (a, b, c)])
    assert all(others == seen for others in comm.allgather_object(seen))


def test_what_one_rank_reads_is_made_by_all(comm: Communicator) -> None:
    """The others go on to a collective of Python's, as where rank 0 prints."""
    for reader in range(comm.size):
        total = comm.allreduce(mx.full((5,), comm.rank + 1.0))
        if comm.rank == reader:
            assert total.tolist() == [comm.size * (comm.size + 1) / 2] * 5
        comm.barrier()


def test_the_state_says_what_is_waited_for(comm: Communicator, core: Any) -> None:
    assert core.state() == (0, "", "", -1, "")
    late = comm.size - 1
    total = core.allreduce(
        mx.ones(3), "direct-one-shot", 17, "allreduce", "model.layers.3"
    )
    if comm.rank != late:
        mx.async_eval(total)
        deadline = time.monotonic() + 20
        while core.state()[-2] < 0.05 and time.monotonic() < deadline:
            time.sleep(0.01)
        *call, seconds, _ = core.state()
        assert call == [17, "allreduce", "model.layers.3"] and 0.05 <= seconds < 20
    else:
        time.sleep(1)
    before = core.seconds()
    comm.barrier()
    assert total.tolist() == [comm.size] * 3
    assert core.state() == (17, "allreduce", "model.layers.3", -1, "")
    assert core.seconds() > (0.05 if comm.rank != late else 0) and before >= 0


@pytest.mark.parametrize(
    "transform",
    [mx.compile, lambda f: mx.vmap(f), lambda f: mx.grad(lambda x: f(x).sum())],
    ids=["compile", "vmap", "grad"],
)
def test_no_transformation_takes_them(
    comm: Communicator, core: Any, transform: Callable[..., Any]
) -> None:
    def layer(x: mx.array) -> mx.array:
        return core.allreduce(x * 2, "direct-one-shot", 1, "allreduce", "mlp")

    refused = pytest.raises(ValueError, match="allreduce of mlp: a collective cannot s")
    outside = mx.ones((2, 3))
    with refused:
        mx.eval(transform(layer)(outside))
    with refused:  # of what does not come from an argument, too
        mx.eval(transform(lambda x: (x + layer(outside)).sum())(outside))
    assert mx.array_equal(layer(mx.ones(3)), mx.full((3,), 2.0 * comm.size))


STOPPED = """
import os, sys, threading, time
import mlx.core as mx
import mlxtp
comm = mlxtp.Communicator.world(measure=False)
class LostError(Exception):
    pass
def lose():
    raise LostError("studio2 is gone")
if comm.rank == 0:
    x = comm.allreduce(mx.ones(3), "one")
    core = comm._arrays._core
    threading.Timer(0.3, lambda: core.stop("studio2 is lost", lose)).start()
    for _ in range(2):
        begin = time.monotonic()
        try:
            mx.eval(comm.allreduce(x + mx.ones(3), "two"))
        except LostError as error:
            print(error, time.monotonic() - begin < 5, flush=True)
    os._exit(7)
time.sleep(60)
"""


@pytest.mark.once
def test_a_wait_is_ended_from_outside() -> None:
    """Those that come later are ended as well, and the job can end."""
    begin = time.monotonic()
    done = mpirun("-n", 2, sys.executable, "-c", STOPPED, timeout_seconds=60)
    assert done.stdout.splitlines() == ["studio2 is gone True"] * 2, done.stderr
    assert time.monotonic() - begin < 40


UNLIKE = """
import sys
import mlx.core as mx
import mlxtp
transport, algorithm, short = sys.argv[1], sys.argv[2], int(sys.argv[3])
comm = mlxtp.Communicator.world(
    transport, measure=False, allreduce=algorithm, timeout_seconds=10
)
mx.eval(comm.allreduce(mx.ones(2 * short), "embed"))
mx.eval(comm.allreduce(mx.ones((1 if comm.rank == 1 else 2) * short), "model.layers.3"))
print("went on")
"""


@pytest.mark.once
@pytest.mark.parametrize("short", [1000, pytest.param(150_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "transport", "algorithm"),
    [
        (3, "mpi", "direct-one-shot"),
        pytest.param(3, "mpi", "direct-two-shot", marks=pytest.mark.slow),
        pytest.param(4, "mpi", "ring-one-shot", marks=pytest.mark.slow),
        pytest.param(3, "mpi-eager", "direct-one-shot", marks=pytest.mark.slow),
    ],
)
def test_parts_of_unlike_sizes_end_the_job(
    ranks: int, transport: str, algorithm: str, short: int
) -> None:
    """With a line that says what was called; nobody's memory is written over."""
    words = [sys.executable, "-c", UNLIKE, transport, algorithm, str(short)]
    done = mpirun("-n", ranks, *words)
    assert done.returncode == 1 and "went on" not in done.stdout
    where = r"allreduce \d of model.layers.3"
    said = rf"{where}: rank \d sent another number of bytes than the \d+ expected"
    if transport == "mpi-eager":
        said = rf"messages did not arrive within 10 s.* is in {where}"
    assert re.search(said, done.stderr), done.stderr


def test_sizes_and_roots_that_do_not_fit(comm: Communicator) -> None:
    x = mx.ones((2, 4))
    alike = [4] * comm.size
    for sizes in (alike[1:], [*alike, 4], [5] * comm.size, [*alike[:-1], -4]):
        if comm.size > 1 or sizes != [-4]:
            with pytest.raises(ValueError, match=r"allgather of x \(2, 4\) with sizes"):
                comm.allgather(x, sizes)
    with pytest.raises(ValueError, match=r"allgather of x \(\) with"):
        comm.allgather(mx.array(1), [1] * comm.size)
    for root in (-1, comm.size):
        with pytest.raises(ValueError, match=f"root {root}: there are {comm.size} r"):
            comm.bcast(x, root)


def test_threads(comm: Communicator, core: Any) -> None:
    """One that has evaluated what it called lets another go on; else that is told."""

    def call() -> mx.array:
        return core.allreduce(mx.ones(3) * 2, "direct-one-shot", 1, "allreduce", "")

    def in_thread(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    mx.eval(call())
    assert in_thread(lambda: call().tolist()) == [2 * comm.size] * 3
    mine = call()
    with pytest.raises(RuntimeError, match="another thread has called collectives"):
        in_thread(call)
    in_thread(comm.barrier)  # begins nothing that it cannot
    assert mine.tolist() == [2 * comm.size] * 3


def test_two_communicators_keep_the_order_of_the_calls(
    comm: Communicator, core: Any
) -> None:
    a = comm.allreduce(mx.full((3,), comm.rank))
    b = core.allreduce(mx.full((4,), 2), "direct-one-shot", 1, "allreduce", "")
    first, second = (a, b) if comm.rank % 2 else (b, a)
    mx.eval(first)
    mx.eval(second)
    assert a.tolist() == [comm.size * (comm.size - 1) / 2] * 3
    assert b.tolist() == [2 * comm.size] * 4


FAILED_INPUT = """
import sys, time
from pathlib import Path
import mlx.core as mx
import mlxtp
comm = mlxtp.Communicator.world(measure=False)
file = Path(sys.argv[1]) / f"{comm.rank}.safetensors"
mx.save_safetensors(str(file), {"x": mx.ones(4096)})
x = mx.load(str(file))["x"]
if comm.rank == 1:
    file.write_bytes(file.read_bytes()[:200])
try:
    total = comm.allreduce(x, "embed")
    mx.eval(total)
    print("a sum", total[0].item(), flush=True)
except Exception as error:
    print("caught", type(error).__name__, flush=True)
time.sleep(60)
"""


@pytest.mark.once
def test_an_input_that_fails_is_not_sent(tmp_path: Path) -> None:
    """And the job ends, also where a program catches what MLX raises."""
    done = mpirun("-n", 2, sys.executable, "-c", FAILED_INPUT, tmp_path)
    assert done.returncode != 0 and "a sum" not in done.stdout, done.stdout
    assert re.search(r"allreduce \d of embed: ", done.stderr), done.stderr


def test_a_rank_without_columns_chooses_as_the_others(comm: Communicator) -> None:
    """The algorithm follows from the largest part, which all ranks know."""
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    arrays, asked = comm._arrays, []
    kept, arrays._gather = arrays._gather, lambda n: asked.append(n) or kept(n)
    try:
        sizes = [0] + [5] * (comm.size - 1)
        comm.allgather(mx.ones((3, 2, sizes[comm.rank])), sizes)
    finally:
        arrays._gather = kept
    assert comm.allgather_object(asked) == [[3 * 2 * 5 * 4]] * comm.size

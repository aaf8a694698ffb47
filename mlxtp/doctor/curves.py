"""What an allreduce and an allgather take, as generation makes them."""

import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from mlxtp.cluster.measured import Collective
from mlxtp.comm.communicator import Communicator

# Bytes of a part: a hidden vector of one token is 1 to 32 KiB, of a prompt more.
SIZES = [2**power for power in (8, 10, 12, 14, 16, 18, 20)]

BUDGET_SECONDS = 0.15
CALLS = (4, 30)

# Between two collectives a layer computes: ranks that share cores, or wake from a
# wait, come to the next one as they do then.
OPERATIONS = 16
SMALL = 1024


def measure(comm: Communicator) -> list[Collective]:
    """Time both collectives for every size, on all ranks together."""
    small = mx.ones(SMALL)
    mx.eval(small)

    def compute() -> None:
        y = small
        for _ in range(OPERATIONS):
            y = y * small
        mx.eval(y)

    found = []
    for size in SIZES:
        part = mx.ones(size // 2, mx.bfloat16)
        mx.eval(part)
        sizes = [part.size] * comm.size
        ways: dict[str, Callable[[], mx.array]] = {
            "allreduce": partial(comm.allreduce, part),
            "allgather": partial(comm.allgather, part, sizes),
        }
        for name, way in ways.items():
            found.append(Collective(name, size, _seconds(comm, way, compute)))
    return sorted(found, key=lambda it: (it.name != "allreduce", it.part_bytes))


def _seconds(
    comm: Communicator, way: Callable[[], mx.array], compute: Callable[[], None]
) -> float:
    """The median call, each as the mean over ranks: a rank that comes late waits less
    for the others, and they for it; with what ranks compute the mean adds up to what
    a layer takes."""

    def call() -> float:
        compute()
        begin = time.perf_counter()
        mx.eval(way())
        return time.perf_counter() - begin

    call()  # makes buffers and connections
    once = max(comm.allgather_object(call()))
    least, most = CALLS
    calls = min(max(int(BUDGET_SECONDS / once), least), most)
    times = comm.allgather_object([call() for _ in range(calls)])
    return float(np.median(np.mean(times, axis=0)))

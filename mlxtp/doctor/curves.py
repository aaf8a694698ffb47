"""How long an allreduce and an allgather take when called as generation does."""

import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from mlxtp.cluster.measured import Collective
from mlxtp.comm.communicator import Communicator

# Bytes of a part: the hidden vector of a token has 1 to 32 KiB, a prompt's more.
SIZES = [2**power for power in (8, 10, 12, 14, 16, 18, 20)]

# So many calls are timed, at least and at most, as fit in so many seconds.
BUDGET_SECONDS = 0.15
CALLS = (4, 30)

# Between two collectives so many operations on so many elements are computed, as a
# layer does: ranks that share cores, or wake from a wait, are then as late as there.
OPERATIONS = 16
SMALL = 1024


def measure(comm: Communicator) -> list[Collective]:
    """Time both collectives for every size, on all ranks together.

    Communicates: both collectives, for every size, up to 31 times.
    """
    small = mx.ones(SMALL)
    mx.eval(small)

    def compute() -> None:
        y = small
        for _ in range(OPERATIONS):
            y = y * small
        mx.eval(y)

    curves = []
    for size in SIZES:
        part = mx.ones(size // 2, mx.bfloat16)
        mx.eval(part)
        sizes = [part.size] * comm.size
        collectives: dict[str, Callable[[], mx.array]] = {
            "allreduce": partial(comm.allreduce, part),
            "allgather": partial(comm.allgather, part, sizes),
        }
        for name, call in collectives.items():
            curves.append(Collective(name, size, _seconds(comm, call, compute)))
    return sorted(curves, key=lambda one: (one.name != "allreduce", one.part_bytes))


def _seconds(
    comm: Communicator, collective: Callable[[], mx.array], compute: Callable[[], None]
) -> float:
    """The median over calls of the mean over ranks.

    A late rank waits less, and the others wait for it. In the mean over ranks the
    times of computing and of collectives add up to those of a layer.
    """

    def timed() -> float:
        compute()
        begin = time.perf_counter()
        mx.eval(collective())
        return time.perf_counter() - begin

    timed()  # makes buffers and connections
    once = max(comm.allgather_object(timed()))
    least, most = CALLS
    calls = min(max(int(BUDGET_SECONDS / once), least), most)
    times = comm.allgather_object([timed() for _ in range(calls)])
    return float(np.median(np.mean(times, axis=0)))

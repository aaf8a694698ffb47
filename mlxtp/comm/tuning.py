"""Which algorithm of an allreduce is taken for which size: measured at the start."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mlxtp.cluster.curve import interpolate
from mlxtp.cluster.units import binary_size
from mlxtp.comm.progress import Progress
from mlxtp.comm.transports import Transport

# Bytes of a part that are timed, the most telling first: decoding, prefill, between.
SIZES = (32 * 1024, 1024 * 1024, 256 * 1024, 4 * 1024)

# When so much time is spent, no other size is begun.
BUDGET_SECONDS = 1.2

# Algorithms that come within this factor of the fastest are timed again, for so long.
CLOSE = 1.5
AGAIN_SECONDS = 0.15
AGAIN_CALLS = (2, 20)

# Without a measurement, parts of so many bytes and more are added two-shot.
TWO_SHOT_BYTES = 256 * 1024


@dataclass(frozen=True)
class Tuning:
    """The seconds of each algorithm for parts of `sizes` bytes, on the slowest rank.

    The sizes ascend. All ranks hold the same numbers, so they choose alike. Without
    sizes nothing was timed: parts below `TWO_SHOT_BYTES` go one-shot and others
    two-shot, direct before ring, as far as there is a choice.
    """

    sizes: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]

    def algorithm(self, nbytes: int) -> str:
        """Return the fastest algorithm of an allreduce of parts of `nbytes`."""
        return self._fastest(nbytes, list(self.seconds))

    def gather(self, nbytes: int) -> str:
        """Return the algorithm whose gather is the fastest for parts of `nbytes`."""
        one_shot = [name for name in self.seconds if name.endswith("one-shot")]
        return self._fastest(nbytes, one_shot or list(self.seconds))

    def _fastest(self, nbytes: int, names: Sequence[str]) -> str:
        if not self.sizes:
            kind = "one-shot" if nbytes < TWO_SHOT_BYTES else "two-shot"
            return min(names, key=lambda name: (kind not in name, "direct" not in name))
        return min(
            names, key=lambda name: interpolate(nbytes, self.sizes, self.seconds[name])
        )

    def __str__(self) -> str:
        """Tell what was timed, and which algorithm is taken from which size on."""
        ranges = groupby((2**power for power in range(8, 25)), self.algorithm)
        taken = [f"{name} from {binary_size(next(sizes))}" for name, sizes in ranges]
        taken[0] = taken[0].rpartition(" from")[0]
        if not self.sizes:
            return f"allreduce: {', '.join(taken)}"
        lines = ["".join(f"{binary_size(size):>10}" for size in self.sizes)]
        lines += [
            "".join(f"{1000 * seconds:10.3f}" for seconds in row)
            for row in self.seconds.values()
        ]
        names = ["allreduce, ms", *self.seconds]
        table = [f"{name:16}{line}" for name, line in zip(names, lines, strict=True)]
        return "\n".join([*table, "taken: " + ", ".join(taken)])


def untimed(names: Sequence[str]) -> Tuning:
    """Return the tuning that takes one of `names` by size alone."""
    return Tuning((), dict.fromkeys(names, ()))


# Sums an array (n,) over ranks by an algorithm.
Allreduce = Callable[[np.ndarray, str], object]


def choose(
    allreduce: Allreduce,
    transport: Transport,
    names: Sequence[str],
    progress: Progress,
    *,
    measure: bool,
) -> Tuning:
    """Return what takes one of `names` for each size, timed if `measure`.

    Communicates: what `tune` does, if `measure`.
    """
    if not measure:
        return untimed(names)
    with progress.unlimited(), progress.collective("measurement of allreduces"):
        return tune(allreduce, transport, names)


def tune(allreduce: Allreduce, transport: Transport, names: Sequence[str]) -> Tuning:
    """Time the algorithms of `names` against each other; one alone is not timed.

    Communicates: allreduces of 4 KiB to 1 MiB, for about `BUDGET_SECONDS`.
    """
    if len(names) == 1:
        return untimed(names)
    timer = _Timer(allreduce, transport)
    by_size: dict[int, list[float]] = {}
    begin = time.perf_counter()
    for size in SIZES:
        spent = max(transport.allgather_object(time.perf_counter() - begin))
        if len(by_size) >= 2 and spent > BUDGET_SECONDS:
            break
        by_size[size] = timer.seconds(np.zeros(size, np.uint8).view(np.float32), names)
    sizes = sorted(by_size)
    columns = zip(*(by_size[size] for size in sizes), strict=True)
    return Tuning(tuple(sizes), dict(zip(names, columns, strict=True)))


class _Timer:
    """Time calls on all ranks, which see the same numbers."""

    def __init__(self, allreduce: Allreduce, transport: Transport) -> None:
        self._allreduce = allreduce
        self._transport = transport

    def seconds(self, part: np.ndarray, names: Sequence[str]) -> list[float]:
        """Time each algorithm; those that are close to the fastest for longer."""
        for name in names:  # makes buffers and connections
            self._allreduce(part, name)
        [row] = self._timed(part, names, 1)
        first = dict(zip(names, row, strict=True))
        close = [name for name in names if first[name] <= CLOSE * min(row)]
        least, most = AGAIN_CALLS
        affordable = int(AGAIN_SECONDS / sum(first[name] for name in close))
        again = self._timed(part, close, min(max(affordable, least), most))
        # The median, for either side may be interrupted.
        medians = zip(close, np.median(again, 0).tolist(), strict=True)
        return list((first | dict(medians)).values())

    def _timed(self, part: np.ndarray, names: Sequence[str], calls: int) -> np.ndarray:
        """Seconds of every call (calls, names), on the slowest rank, taking turns."""
        mine = np.empty((calls, len(names)))
        for call in range(calls):
            for place, name in enumerate(names):
                begin = time.perf_counter()
                self._allreduce(part, name)
                mine[call, place] = time.perf_counter() - begin
        return np.max(self._transport.allgather_object(mine), axis=0)

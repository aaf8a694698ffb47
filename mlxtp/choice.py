"""Which way of an allreduce is taken for which size: measured when ranks start."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mlxtp.collectives import Collectives
from mlxtp.transports import Transport

# Bytes of a part that are timed, the most telling first: decoding, prefill, between.
SIZES = (32 * 1024, 1024 * 1024, 256 * 1024, 4 * 1024)
REPEATS = 3

# When so much time is spent, no other size is begun.
BUDGET_SECONDS = 1.2


@dataclass(frozen=True)
class Choice:
    """The seconds that each way took for parts of `sizes` bytes, on the slowest rank.

    The sizes ascend. All ranks hold the same numbers, so they choose alike. A way
    without any other beside it is not timed.
    """

    sizes: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]

    def way(self, nbytes: int) -> str:
        """The fastest way of an allreduce of parts of `nbytes`."""
        return self._fastest(nbytes, list(self.seconds))

    def gather(self, nbytes: int) -> str:
        """The way whose gather is the fastest for parts of `nbytes`."""
        one_shot = [name for name in self.seconds if name.endswith("one-shot")]
        return self._fastest(nbytes, one_shot or list(self.seconds))

    def _fastest(self, nbytes: int, names: Sequence[str]) -> str:
        return min(names, key=lambda name: self._expected(name, nbytes))

    def _expected(self, name: str, nbytes: int) -> float:
        """On the lines between the sizes, the last of which goes on."""
        if not self.sizes:
            return 0.0
        sizes, seconds = self.sizes, self.seconds[name]
        rate = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        above = rate * max(0, nbytes - sizes[-1])
        return float(np.interp(nbytes, sizes, seconds)) + above

    def __str__(self) -> str:
        if not self.sizes:
            return f"allreduce: {', '.join(self.seconds)}"
        lines = ["".join(f"{_in_words(size):>10}" for size in self.sizes)]
        lines += [
            "".join(f"{1000 * seconds:10.3f}" for seconds in row)
            for row in self.seconds.values()
        ]
        names = ["allreduce, ms", *self.seconds]
        table = [f"{name:16}{line}" for name, line in zip(names, lines, strict=True)]
        ranges = groupby((2**power for power in range(8, 25)), self.way)
        taken = [f"{way} from {_in_words(next(sizes))}" for way, sizes in ranges]
        taken[0] = taken[0].rpartition(" from")[0]
        return "\n".join([*table, "taken: " + ", ".join(taken)])


def choose(
    collectives: Collectives, transport: Transport, names: Sequence[str]
) -> Choice:
    """Time the ways of `names` against each other, on all ranks together."""
    if len(names) == 1:
        return Choice((), {names[0]: ()})
    by_size: dict[int, list[float]] = {}
    spent = 0.0
    for size in SIZES:
        if len(by_size) >= 2 and spent > BUDGET_SECONDS:
            break
        part = np.zeros(size, np.uint8).view(np.float32)
        mine = [_timed(collectives, part, name) for name in names]
        everyones = np.array(transport.allgather_objects(mine))
        by_size[size] = everyones.max(axis=0)[:, 0].tolist()
        spent += float(everyones[:, :, 1].sum(axis=1).max())
    sizes = sorted(by_size)
    columns = zip(*(by_size[size] for size in sizes), strict=True)
    return Choice(tuple(sizes), dict(zip(names, columns, strict=True)))


def _timed(collectives: Collectives, part: np.ndarray, way: str) -> tuple[float, float]:
    """The quickest of some calls, for whatever else runs only adds; and all seconds."""
    times = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        collectives.allreduce(part, way)
        times.append(time.perf_counter() - begin)
    return min(times[1:]), sum(times)


def _in_words(nbytes: int) -> str:
    kib = nbytes / 1024
    return f"{kib / 1024:g} MiB" if kib >= 1024 else f"{kib:g} KiB"

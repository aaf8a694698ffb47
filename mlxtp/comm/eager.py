"""Collectives on MLX arrays through memory: what is sent is evaluated first."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxtp.comm.allreduce import Collectives, StartedSum, algorithms
from mlxtp.comm.progress import Progress
from mlxtp.comm.request import Request
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import MessageTransport
from mlxtp.comm.tuning import choose

T = TypeVar("T")


class EagerCollectives:
    """Send the memory of evaluated arrays as it lies, and make arrays of results.

    `tuning` says which algorithm an allreduce takes for which size. Unless `measure`
    is False it is measured here, which takes about a second.
    """

    is_timed = True
    takes_turns = False

    def __init__(
        self,
        transport: MessageTransport,
        progress: Progress,
        traffic: Traffic,
        *,
        allreduce: str = "auto",
        wire: str = "plain",
        measure: bool = True,
    ) -> None:
        self.over = str(transport)
        self._rank, self._size = transport.rank, transport.size
        self._progress = progress
        self._traffic = traffic
        self._collectives = Collectives(transport, wire)
        names = algorithms(transport.size, allreduce)
        allreduce_now = self._collectives.allreduce
        self.tuning = choose(allreduce_now, transport, names, progress, measure=measure)
        self._collectives.forget()
        self._algorithm = cache(self.tuning.algorithm)
        self._gather = cache(self.tuning.gather)

    def __str__(self) -> str:
        """Tell which algorithm is taken from which size on."""
        return str(self.tuning)

    def flush(self) -> None:
        """Do nothing: what was called is made."""

    def close(self) -> None:
        """Give up buffers and requests."""
        self._collectives.forget()

    def allreduce(self, x: mx.array, at: str) -> mx.array:
        """Sum x over ranks.

        Shapes: x (...) partial -> (...) replicated.
        """
        with self._counted(x, "allreduce", at) as part:
            algorithm = self._algorithm(part.nbytes)
            total = self._collectives.allreduce(part, algorithm)
            return mx.array(total.reshape(x.shape))

    def iallreduce(self, x: mx.array, at: str) -> Request:
        """Start to sum x over ranks.

        Shapes: x (...) partial -> (...) replicated.
        """
        # An array of its own: what changes x in place meanwhile leaves it as it is.
        flat = mx.reshape(x, (-1,))
        with self._counted(flat, "iallreduce", at) as part:
            algorithm = self._algorithm(part.nbytes)
            started = self._collectives.start_allreduce(part, algorithm)
        return Request(lambda: self._finish(started, x.shape, at))

    def _finish(self, started: StartedSum, shape: tuple[int, ...], at: str) -> mx.array:
        """Wait for the sum and return it."""
        begin = time.perf_counter()
        with self._progress.collective("iallreduce", at):
            total = self._collectives.finish_allreduce(started)
            result = mx.array(total.reshape(shape))
        self._traffic.add_seconds(time.perf_counter() - begin)
        return result

    def take_turns(
        self, first: Callable[[], T], second: Callable[[], T]
    ) -> tuple[T, T]:
        """Make one after the other: a collective evaluates what it sends."""
        return first(), second()

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str) -> mx.array:
        """Join the ranks' arrays along the last axis, in rank order.

        Shapes: x (..., sizes[rank]) sharded -> (..., sum(sizes)) replicated.
        """
        rows = math.prod(x.shape[:-1])
        counts = [rows * size for size in sizes]
        with self._counted(x, "allgather", at) as part:
            algorithm = self._gather(max(counts) * part.itemsize)
            joined = self._collectives.allgather(part, counts, algorithm)
            if rows > 1 and joined.size:
                pieces = np.split(joined, np.cumsum(counts)[:-1])
                joined = np.concatenate(
                    [piece.reshape(rows, -1) for piece in pieces if piece.size], axis=1
                )
            return mx.array(joined.reshape(*x.shape[:-1], sum(sizes)))

    def bcast(self, x: mx.array, root: int, at: str) -> mx.array:
        """Give every rank the x of `root`; the others' are evaluated, too.

        Shapes: x (...) -> (...) replicated.
        """
        with self._counted(x, "bcast", at) as part:
            # An allgather in which all parts but one are empty.
            counts = [part.size * (rank == root) for rank in range(self._size)]
            mine, algorithm = part[: counts[self._rank]], self._gather(part.nbytes)
            whole = self._collectives.allgather(mine, counts, algorithm)
            return mx.array(whole.reshape(x.shape))

    @contextmanager
    def _counted(self, x: mx.array, name: str, at: str) -> Iterator[np.ndarray]:
        """Evaluate `x` and give its memory (n,); count what is done as traffic."""
        mx.eval(x)
        begin = time.perf_counter()
        with self._progress.collective(name, at):
            yield memory(x)
        self._traffic.count(x.nbytes, time.perf_counter() - begin)


def memory(x: mx.array) -> np.ndarray:
    """Return the memory of an array (n,) as it lies; a copy of one with gaps."""
    view = memoryview(x)  # type: ignore[arg-type]  # mlx tells no types of buffers
    if not view.c_contiguous:
        view = memoryview(mx.contiguous(x))  # type: ignore[arg-type]
    dtype = ml_dtypes.bfloat16 if x.dtype == mx.bfloat16 else np.dtype(view.format)
    return np.frombuffer(view, dtype) if x.size else np.empty(0, dtype)

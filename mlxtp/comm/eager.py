"""Collectives on MLX arrays through memory: what is sent is evaluated first."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxtp.comm.allreduce import Collectives, ways
from mlxtp.comm.heartbeat import Watch
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import MessageTransport
from mlxtp.comm.tuning import choose


class EagerCollectives:
    """Sends the memory of evaluated arrays as it lies, and makes arrays of results.

    `choice` is the way of an allreduce by size.
    """

    def __init__(
        self,
        transport: MessageTransport,
        watch: Watch,
        traffic: Traffic,
        allreduce: str,
        wire: str,
    ) -> None:
        self._watch = watch
        self._traffic = traffic
        self._collectives = Collectives(transport, wire)
        with (
            watch.unlimited(),
            watch.collective("measurement of allreduces"),
        ):
            names = ways(transport.size, allreduce)
            self.choice = choose(self._collectives, transport, names)
        self._collectives.forget()
        self._way = cache(self.choice.way)
        self._gather = cache(self.choice.gather)

    def __str__(self) -> str:
        return str(self.choice)

    def allreduce(self, x: mx.array, at: str) -> mx.array:
        """Sum x (...) over ranks."""
        with self._counted(x, "allreduce", at) as part:
            way = self._way(part.nbytes)
            total = self._collectives.allreduce(part, way)
            return mx.array(total.reshape(x.shape))

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str) -> mx.array:
        """Join the ranks' x (..., sizes[rank]) along the last axis."""
        rows = math.prod(x.shape[:-1])
        counts = [rows * size for size in sizes]
        with self._counted(x, "allgather", at) as part:
            way = self._gather(max(counts) * part.itemsize)
            joined = self._collectives.allgather(part, counts, way)
            if rows > 1:
                pieces = np.split(joined, np.cumsum(counts)[:-1])
                joined = np.concatenate(
                    [piece.reshape(rows, -1) for piece in pieces if piece.size], axis=1
                )
            return mx.array(joined.reshape(*x.shape[:-1], sum(sizes)))

    @contextmanager
    def _counted(self, x: mx.array, what: str, at: str) -> Iterator[np.ndarray]:
        """Evaluate `x` and give its memory (n,); count what is done as traffic."""
        mx.eval(x)
        begin = time.perf_counter()
        with self._watch.collective(what, at):
            yield memory(x)
        self._traffic.count(x.nbytes, time.perf_counter() - begin)


def memory(x: mx.array) -> np.ndarray:
    """The memory of an array (n,) as it lies; of one with gaps a copy without them."""
    view = memoryview(x)  # type: ignore[arg-type]  # mlx tells no types of buffers
    if not view.c_contiguous:
        view = memoryview(mx.contiguous(x))  # type: ignore[arg-type]
    dtype = ml_dtypes.bfloat16 if x.dtype == mx.bfloat16 else np.dtype(view.format)
    return np.frombuffer(view, dtype) if x.size else np.empty(0, dtype)

"""Collectives on MLX arrays through memory: what is sent is evaluated first."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxtp.choice import choose
from mlxtp.collectives import Collectives, ways
from mlxtp.traffic import Traffic
from mlxtp.transports import MessageTransport
from mlxtp.watch import Watch


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
        with watch.collective("measurement of the ways of an allreduce"):
            names = ways(transport.size, allreduce)
            self.choice = choose(self._collectives, transport, names)
        self._collectives.forget()

    def __str__(self) -> str:
        return str(self.choice)

    def allreduce(self, x: mx.array, at: str) -> mx.array:
        """Sum x (...) over ranks."""
        with self._counted(x, "allreduce", at) as part:
            way = self.choice.way(part.nbytes)
            total = self._collectives.allreduce(part.reshape(-1), way)
            return mx.array(total.reshape(x.shape))

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str) -> mx.array:
        """Join the ranks' x (..., sizes[rank]) along the last axis."""
        rows = math.prod(x.shape[:-1])
        counts = [rows * size for size in sizes]
        with self._counted(x, "allgather", at) as part:
            way = self.choice.gather(max(counts) * part.itemsize)
            joined = self._collectives.allgather(part.reshape(-1), counts, way)
            if rows > 1:
                pieces = np.split(joined, np.cumsum(counts)[:-1])
                joined = np.concatenate(
                    [piece.reshape(rows, -1) for piece in pieces if piece.size], axis=1
                )
            return mx.array(joined.reshape(*x.shape[:-1], sum(sizes)))

    @contextmanager
    def _counted(self, x: mx.array, what: str, at: str) -> Iterator[np.ndarray]:
        """Evaluate `x` and give its memory; count what is done with it as traffic."""
        as_bytes = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
        mx.eval(as_bytes)
        begin = time.perf_counter()
        part = np.ascontiguousarray(np.asarray(as_bytes))
        with self._watch.collective(what, at):
            yield part.view(ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else part
        self._traffic.count(part.nbytes, time.perf_counter() - begin)

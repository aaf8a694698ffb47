"""Collectives on MLX arrays that stand in MLX's graph: nothing is evaluated."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from mlxtp.comm.progress import Progress
from mlxtp.comm.request import Request
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import GraphTransport
from mlxtp.comm.turns import note, take_turns

T = TypeVar("T")


class GraphCollectives:
    """Gather by one of MLX's backends, and sum in rank order.

    The backends' own sums are made in an order of theirs, in 16 bits for 16-bit
    types. Ours cost more bytes where arrays are large: every rank gets all parts.
    """

    is_timed = False
    takes_turns = True

    def __init__(
        self, transport: GraphTransport, progress: Progress, traffic: Traffic
    ) -> None:
        self.over = str(transport)
        self._transport = transport
        self._progress = progress
        self._traffic = traffic

    def __str__(self) -> str:
        """Tell how an allreduce is made."""
        return "allreduce: gathers in the graph, sums in rank order"

    def flush(self) -> None:
        """Do nothing: MLX's backends make what is evaluated."""

    def close(self) -> None:
        """Leave no collective that others are still in."""
        self._transport.close()

    def take_turns(
        self, first: Callable[[], T], second: Callable[[], T]
    ) -> tuple[T, T]:
        """Put two computations into the graph, and begin their gathers by turns."""
        with self._progress.turns() as call:
            return take_turns(first, second, call)

    def _gathered(self, x: mx.array) -> mx.array:
        """Gather the ranks' arrays: x (...) -> (ranks, ...), unevaluated."""
        parts = self._transport.allgather(x)
        note(parts)
        return parts

    def allreduce(self, x: mx.array, at: str) -> mx.array:
        """Sum x over ranks, in float32 for 16-bit floats.

        Shapes: x (...) partial -> (...) replicated, unevaluated.
        """
        self._traffic.count(x.nbytes)
        self._progress.put_in_graph("allreduce", at)
        parts = self._gathered(x)
        if x.dtype in (mx.float16, mx.bfloat16):
            parts = parts.astype(mx.float32)
        total = parts[0]
        for rank in range(1, self._transport.size):
            total = total + parts[rank]
        return total.astype(x.dtype)

    def iallreduce(self, x: mx.array, at: str) -> Request:
        """Put the sum of x over ranks into the graph: MLX waits when it evaluates.

        Shapes: x (...) partial -> (...) replicated, unevaluated.
        """
        total = self.allreduce(x, at)
        return Request(lambda: total)

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str) -> mx.array:
        """Join the ranks' arrays along the last axis, in rank order.

        Shapes: x (..., sizes[rank]) sharded -> (..., sum(sizes)) replicated,
        unevaluated.
        """
        self._traffic.count(x.nbytes)
        self._progress.put_in_graph("allgather", at)
        missing = max(sizes) - x.shape[-1]
        padded = mx.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, missing)])
        parts = self._gathered(padded)
        return mx.concatenate(
            [parts[rank][..., :size] for rank, size in enumerate(sizes)], axis=-1
        )

    def bcast(self, x: mx.array, root: int, at: str) -> mx.array:
        """Give every rank the x of `root`.

        All ranks' are gathered: so the graph, and with it the order of collectives, is
        the same on every rank.

        Shapes: x (...) -> (...) replicated, unevaluated.
        """
        self._traffic.count(x.nbytes)
        self._progress.put_in_graph("bcast", at)
        return self._gathered(x)[root]

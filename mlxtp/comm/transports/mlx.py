"""MLX's own backends: collectives that stand in the graph."""

import pickle
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtp.comm.transports import Transport, backends

# What every backend moves as it is; other arrays travel as bytes.
FLOATS = (mx.float16, mx.bfloat16, mx.float32)


class MLXTransport:
    """All ranks of the job as a `GraphTransport`, over one of MLX's backends.

    All collectives run on one stream, so that those of independent parts of a graph
    keep their order, which is the same on every rank that evaluates the same graph.
    """

    def __init__(self, backend: str, control: Transport | None) -> None:
        """Start `backend` between the ranks of `control`, or "mpi" without it.

        Raises: ValueError that says what is missing, with `control` on all ranks.
        """
        self._backend = backend
        self._control = control
        self._group = backends.start(backend, control)
        self.rank: int = self._group.rank() if self._group else 0
        self.size: int = self._group.size() if self._group else 1
        self._stream = mx.new_thread_local_stream(mx.cpu)

    def __str__(self) -> str:
        """Name the transport, for `Communicator.describe`."""
        return f"MLX's {self._backend}"

    def allgather(self, x: mx.array) -> mx.array:
        """Put the ranks' arrays, alike in shape, on a new first axis, unevaluated.

        Shapes: x (...) -> (size, ...) replicated.
        """
        x = x[None]
        if self._group is None:
            return x
        sent = x if x.dtype in FLOATS else x.view(mx.uint8)
        parts = mx.distributed.all_gather(sent, group=self._group, stream=self._stream)
        return parts if x.dtype in FLOATS else parts.view(x.dtype)

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the object of every rank, in rank order."""
        if self._control is not None:
            return self._control.allgather_object(value)
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.array(self.allgather(mx.array(mine.size)))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: mine.size] = mine
        parts = np.array(self.allgather(mx.array(padded)))
        return [
            pickle.loads(part[:size]) for part, size in zip(parts, sizes, strict=True)
        ]

    def bcast_object(self, value: Any, root: int) -> Any:
        """Give every rank the object of `root`."""
        if self._control is not None:
            return self._control.bcast_object(value, root)
        return self.allgather_object(value if self.rank == root else None)[root]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self._control is not None:
            self._control.barrier()
        else:
            mx.eval(self.allgather(mx.zeros(1)))

    def close(self) -> None:
        """Leave no collective that others are still in."""
        mx.synchronize(self._stream)
        if self._group is not None and self._backend == "mpi":
            backends.end_mpi(self._group)

"""MLX's own backends: collectives that stand in the graph."""

import mlx.core as mx

from mlxtp.comm.transports import Transport, backends

# What every backend moves as it is; other arrays travel as bytes.
FLOATS = (mx.float16, mx.bfloat16, mx.float32)


class MLXTransport:
    """All ranks of the job as a `GraphTransport`, over one of MLX's backends.

    All collectives run on one stream, so that those of independent parts of a graph
    keep their order, which is the same on every rank that evaluates the same graph.
    """

    def __init__(self, backend: str, control: Transport) -> None:
        """Start `backend` between the ranks of `control`.

        Raises: ValueError, on every rank, that says what is missing.
        """
        self.rank, self.size = control.rank, control.size
        self._backend = backend
        self._group = backends.start(backend, control)
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

    def close(self) -> None:
        """Leave no collective that others are still in."""
        mx.synchronize(self._stream)

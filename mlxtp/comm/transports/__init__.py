"""How bytes get to the other ranks. What is above names no message library.

`connect` starts one of `TRANSPORTS`. They are of two kinds: a `MessageTransport`
moves memory, so what is sent has to be evaluated first; a `GraphTransport` has
collectives that stand in MLX's graph.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

# Name -> MLX's name of its backend; None is mpi4py.
TRANSPORTS: dict[str, str | None] = {
    "mpi": None,
    "ring": "ring",
    "mlx-mpi": "mpi",
    "jaccl": "jaccl",
}


class Transport(Protocol):
    """Moves plain objects between the ranks of one job.

    Every rank makes the same calls in the same order.
    """

    rank: int
    size: int

    def bcast_object(self, value: Any, root: int) -> Any:
        """Give every rank the object of `root`."""
        ...

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the object of every rank, in rank order."""
        ...

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        ...

    def close(self) -> None:
        """Part from the other ranks, when all of them do."""
        ...


# A send or a receive that is under way, or can be started again.
MessageRequest = Any


@runtime_checkable
class MessageTransport(Transport, Protocol):
    """Moves contiguous buffers of bytes, each (n,) uint8.

    Messages between two ranks with the same tag arrive in the order they were sent.
    """

    def send(self, buffer: np.ndarray, to: int, tag: int) -> MessageRequest:
        """Begin to send; the buffer stays as it is until the request is done."""
        ...

    def prepare_send(self, buffer: np.ndarray, to: int, tag: int) -> MessageRequest:
        """Make a send of what is in `buffer` whenever `start` is called."""
        ...

    def prepare_receive(
        self, buffer: np.ndarray, source: int, tag: int
    ) -> MessageRequest:
        """Make a receive into `buffer` whenever `start` is called."""
        ...

    def start(self, requests: Sequence[MessageRequest]) -> None:
        """Begin prepared requests."""
        ...

    def wait(self, requests: Sequence[MessageRequest]) -> None:
        """Wait until all are done."""
        ...

    def wait_some(self, requests: Sequence[MessageRequest]) -> list[int]:
        """Wait until at least one is done; return the places of those that now are."""
        ...

    def free(self, requests: Sequence[MessageRequest]) -> None:
        """Give up prepared requests."""
        ...


class GraphTransport(Transport, Protocol):
    """Has collectives that are part of MLX's graph."""

    def allgather(self, x: mx.array) -> mx.array:
        """Put the ranks' arrays, alike in shape, on a new first axis, unevaluated.

        Shapes: x (...) -> (size, ...) replicated.
        """
        ...


def connect(name: str) -> MessageTransport | GraphTransport:
    """Start MPI between the ranks that mpirun has started, through mpi4py or MLX.

    Raises: ValueError that says what is missing.
    """
    if TRANSPORTS[name] == "mpi":  # MLX's MPI and mpi4py never share a process
        from mlxtp.comm.transports.mlx import MLXTransport

        return MLXTransport("mpi", None)
    from mlxtp.comm.transports.mpi import MPITransport

    return MPITransport()


def add_backend(
    name: str, control: MessageTransport | GraphTransport
) -> MessageTransport | GraphTransport:
    """Start the backend of a transport besides `control`, where it has one.

    Raises: ValueError, on every rank, that says what the transport lacks.
    """
    backend = TRANSPORTS[name]
    if backend in (None, "mpi"):
        return control
    from mlxtp.comm.transports.mlx import MLXTransport

    return MLXTransport(backend, control)


def lacking() -> dict[str, str | None]:
    """Return what this host lacks for each transport; None if nothing."""
    from mlxtp.comm.transports import backends

    return {
        name: backends.missing(backend) if backend else None
        for name, backend in TRANSPORTS.items()
    }

"""How bytes get to the other ranks. What is above names no message library.

`connect` joins the ranks over MPI. That is a `MessageTransport`: it moves memory. MLX's
backends, which `start_backend` starts besides, are each a `GraphTransport`: they have
collectives that stand in MLX's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mlxtp.comm.choices import BACKENDS, TRANSPORTS

if TYPE_CHECKING:  # `comm.launcher` comes by here, in programs without MLX
    import mlx.core as mx
    import numpy as np


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
    `crowded` says whether ranks of this host outnumber its cores. Waits that poll call
    `raise_if_lost`, which does nothing by default.
    """

    crowded: bool
    raise_if_lost: Callable[[], None]

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

    def wait_napping(
        self, requests: Sequence[MessageRequest], longest_nap_seconds: float
    ) -> None:
        """Wait until all are done; sleep between looking and looking again.

        The naps get longer with the time that it takes.
        """
        ...

    def wait_some(self, requests: Sequence[MessageRequest]) -> list[int]:
        """Wait until at least one is done; return the places of those that now are."""
        ...

    def free(self, requests: Sequence[MessageRequest]) -> None:
        """Give up prepared requests."""
        ...

    def is_over(self) -> bool:
        """Whether this rank has ended MPI."""
        ...

    def abandon(self) -> None:
        """Let this process end without the other ranks."""
        ...

    def handle(self) -> int:
        """Return where C finds the handle of MPI's communicator."""
        ...

    def lacks_for_native(self, library_version: str) -> str | None:
        """Return why the native core, which has found this library, cannot be used."""
        ...


class GraphTransport(Protocol):
    """Has collectives that are part of MLX's graph."""

    rank: int
    size: int

    def allgather(self, x: mx.array) -> mx.array:
        """Put the ranks' arrays, alike in shape, on a new first axis, unevaluated.

        Shapes: x (...) -> (size, ...) replicated.
        """
        ...

    def close(self) -> None:
        """Part from the other ranks, when all of them do."""
        ...


def connect() -> MessageTransport:
    """Start MPI between the ranks that mpirun has started."""
    from mlxtp.comm.transports.mpi import MPITransport

    return MPITransport()


def start_backend(name: str, control: Transport) -> GraphTransport:
    """Start one of MLX's `BACKENDS` between the ranks of `control`.

    Raises: ValueError, on every rank, that says what the backend lacks.
    """
    from mlxtp.comm.transports.mlx import MLXTransport

    return MLXTransport(name, control)


def lacking() -> dict[str, str | None]:
    """Return what this host lacks for each transport; None if nothing."""
    from mlxtp.comm.transports import backends

    return {
        name: backends.missing(name) if name in BACKENDS else None
        for name in TRANSPORTS
    }

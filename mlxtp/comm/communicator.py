"""`Communicator`: what a rank knows of the others, and its collectives."""

import atexit
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtp.comm import launcher
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.errors import UsageError
from mlxtp.comm.graph import GraphCollectives
from mlxtp.comm.heartbeat import Watch
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import (
    GraphTransport,
    MessageTransport,
    Transport,
    add_backend,
    connect,
)

TIMEOUT_SECONDS = 60.0
# No allreduce has it; MPI promises tags up to 32767.
EXCHANGE_TAG = 32767


class Communicator:
    """The ranks of one job, each a process, numbered from 0 to `size` - 1.

    Every rank makes the same collective calls in the same order. Over mpi4py,
    collectives on arrays evaluate their input; over MLX's backends they are part of
    the graph. With one rank they return it as it is.
    """

    def __init__(
        self,
        control: MessageTransport | GraphTransport | None = None,
        transport: str = "mpi",
        *,
        allreduce: str = "auto",
        wire: str = "plain",
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """The ranks that `control` connects; without it, a world of size 1.

        Arguments and errors are those of `world`.
        """
        self.rank = control.rank if control else 0
        self.size = control.size if control else 1
        self.host = socket.gethostname()
        self.traffic = Traffic()
        self.is_eager = True  # collectives evaluate, and so can be timed
        self._control = control
        if control is None:
            return
        self._watch = Watch(control, timeout_seconds)
        sys.excepthook = self._end_all_ranks
        try:
            connected = add_backend(transport, control)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._transport = str(connected)
        atexit.register(self._close, *{id(t): t for t in (connected, control)}.values())
        self._arrays: EagerCollectives | GraphCollectives
        if isinstance(connected, MessageTransport):
            self._arrays = EagerCollectives(
                connected, self._watch, self.traffic, allreduce, wire
            )
        else:
            self._arrays = GraphCollectives(connected, self._watch, self.traffic)
            self.is_eager = False

    @classmethod
    def world(
        cls,
        transport: str = "mpi",
        *,
        allreduce: str = "auto",
        wire: str = "plain",
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> "Communicator":
        """All ranks that mpirun started; without mpirun a world of size 1.

        From then on an exception that nothing catches ends all ranks, and is printed
        once, with rank and host; and so does a rank that is missing.

        Args:
            transport: "mpi", or one of MLX's backends: "ring", "mlx-mpi", "jaccl",
                "nccl".
            allreduce: the way of an allreduce, as in `collectives.WAYS`, or the
                beginning of its name; "auto" measures which is the fastest.
            wire: "plain", or "int8" to send activations with 8 bits, inexactly.
            timeout_seconds: the longest that a rank may be silent, wait in one
                collective, or wait for MPI to start on all.

        Raises:
            UsageError: if the transport is not available.
            RuntimeError: if mpirun and mpi4py belong to different MPIs.
        """
        started = launcher.size()
        if started == 0:
            return cls()
        try:
            with launcher.limited_start(timeout_seconds):
                control = connect(transport)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if control.size != started:
            raise RuntimeError(
                f"mpirun started {started} ranks, {control} sees {control.size}: they "
                "belong to different MPI libraries; start with the mpirun of the "
                "environment that mpi4py is installed in"
            )
        if control.size == 1:
            return cls()
        return cls(
            control,
            transport,
            allreduce=allreduce,
            wire=wire,
            timeout_seconds=timeout_seconds,
        )

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        """Sum `x` over ranks: in rank order, the same bits on every rank.

        `at` is the layer that messages name if a rank is missing.

        Shapes: x (...) partial -> (...) replicated, of the same dtype.
        """
        return x if self._control is None else self._arrays.allreduce(x, at)

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str = "") -> mx.array:
        """Join the ranks' arrays along the last axis, in rank order.

        Shapes: x (..., sizes[rank]) sharded -> (..., sum(sizes)) replicated.
        """
        return x if self._control is None else self._arrays.allgather(x, sizes, at)

    def describe(self) -> str:
        """How arrays travel: the transport, and the measured ways of an allreduce."""
        if self._control is None:
            return "one rank: nothing travels"
        return f"{self.size} ranks over {self._transport}\n{self._arrays}"

    def bcast(self, x: mx.array, root: int = 0) -> mx.array:
        """Give every rank the array of `root`.

        Shapes: x (...) of `root` -> (...) replicated, of the same dtype.
        """
        return self.bcast_object(x, root)

    def bcast_object(self, value: Any, root: int = 0) -> Any:
        """Give every rank the plain object of `root`."""
        if self._control is None:
            return value
        with self._watch.collective("bcast"):
            return self._control.bcast_object(value, root)

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the plain object of every rank, in rank order."""
        if self._control is None:
            return [value]
        with self._watch.collective("allgather"):
            return self._control.allgather_object(value)

    def exchange(self, to: Sequence[np.ndarray], sizes: Sequence[int]) -> list[Any]:
        """Send each rank a message, and receive one of `sizes[rank]` bytes from each.

        Shapes: messages (n,) uint8; empty ones are not sent. Its own message comes
        back to a rank as it is.
        """
        received = [np.empty(size, np.uint8) for size in sizes]
        received[self.rank] = to[self.rank]
        if self._control is None:
            return received
        with self._watch.collective("exchange"):
            if not isinstance(self._control, MessageTransport):
                everything = self._control.allgather_object(to)
                return [messages[self.rank] for messages in everything]
            others = [rank for rank in range(self.size) if rank != self.rank]
            receives = [
                self._control.prepare_receive(received[rank], rank, EXCHANGE_TAG)
                for rank in others
                if sizes[rank]
            ]
            self._control.start(receives)
            sends = [
                self._control.send(to[rank], rank, EXCHANGE_TAG)
                for rank in others
                if to[rank].size
            ]
            self._control.wait([*receives, *sends])
            self._control.free(receives)
        return received

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self._control is not None:
            with self._watch.collective("barrier"):
                self._control.barrier()

    def unlimited(self) -> AbstractContextManager[None]:
        """Within it the others may take as long as they need, to load, say.

        Ranks that die, stop or are cut off are noticed all the same.
        """
        return nullcontext() if self._control is None else self._watch.unlimited()

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Turn a mistake found on any rank into the same `UsageError` on all.

        For a block without collectives that checks what people gave us: what one
        rank alone sees (a file missing on its host) ends it on every rank.

        Raises: UsageError for a ValueError or OSError on any rank, with rank and
            host where not all ranks found the same.
        """
        found = None
        try:
            yield
        except (ValueError, OSError) as error:
            found = error
        mine = found and (str(found) or repr(found), self.host)
        reports = self.allgather_object(mine)
        if all(report is None for report in reports):
            return
        rank, report = next((r, it) for r, it in enumerate(reports) if it is not None)
        message, host = report
        if any(other is None or other[0] != message for other in reports):
            message = f"rank {rank} on {host}: {message}"
        raise UsageError(message) from found

    def _close(self, *transports: Transport) -> None:
        with self._watch.finish():
            for transport in transports:
                transport.close()

    def _end_all_ranks(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Print an exception and end every rank: what `world` puts in excepthook."""
        # The others may have failed alike: the first to print ends them all.
        time.sleep(launcher.later_seconds())
        text = "".join(traceback.format_exception(kind, error, trace))
        self._watch.end_job(
            f"{text}mlxtp: rank {self.rank} on {self.host} failed: all ranks end"
        )

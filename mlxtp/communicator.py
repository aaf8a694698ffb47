"""`Communicator`: what a rank knows of the others, and its collectives."""

import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from mlxtp.collectives import Allreduce
from mlxtp.transports import Transport

# Environment variables in which launchers tell how many ranks they started.
LAUNCHED_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launched_by_mpirun() -> int:
    """The number of ranks that mpirun started this one among; 0 without mpirun."""
    return max(int(os.environ.get(name, "0")) for name in LAUNCHED_SIZES)


class AgreedError(ValueError):
    """A mistake in what people gave us, raised on every rank alike."""


@dataclass
class Traffic:
    """What one rank's collectives on arrays have cost since it was last reset.

    `seconds` runs from the moment the rank's own part is computed, so it counts
    waiting for slower ranks. `bytes` is the size of this rank's own parts.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Communicator:
    """The ranks of one job, each a process, numbered from 0 to `size` - 1.

    Every rank makes the same collective calls in the same order. Collectives on
    arrays evaluate their input. With one rank they return it as it is.
    """

    def __init__(self, transport: Transport | None = None) -> None:
        """A communicator over `transport`; without one, a world of size 1."""
        self.rank = transport.rank if transport else 0
        self.size = transport.size if transport else 1
        self.host = socket.gethostname()
        self.traffic = Traffic()
        self._transport = transport
        self._sum = Allreduce(transport) if transport else None

    @classmethod
    def world(cls) -> "Communicator":
        """All ranks that mpirun started; without mpirun a world of size 1.

        An exception that nothing catches then ends all ranks, and is printed
        once, with rank and host. It has to be one: MPI waits for a rank that
        leaves by `sys.exit` alone until the others leave too.

        Raises: RuntimeError if mpirun and mpi4py belong to different MPIs.
        """
        launched = launched_by_mpirun()
        if launched == 0:
            return cls()
        from mlxtp.transports.mpi import MPITransport

        transport = MPITransport()
        if transport.size != launched:
            raise RuntimeError(
                f"mpirun started {launched} ranks, mpi4py sees {transport.size}: they "
                "belong to different MPI libraries; start with the mpirun of the "
                "environment that mpi4py is installed in"
            )
        if transport.size == 1:
            return cls()
        comm = cls(transport)
        sys.excepthook = comm._end_all_ranks
        return comm

    def allreduce(self, x: mx.array) -> mx.array:
        """Sum `x` over ranks: in rank order, the same bits on every rank.

        Shapes: x (...) partial -> (...) replicated, of the same dtype.
        """
        if self._sum is None:
            return x
        with self._counted(x) as part:
            return mx.array(self._sum(part.reshape(-1)).reshape(x.shape))

    def allgather(self, x: mx.array, sizes: Sequence[int]) -> mx.array:
        """Join the ranks' arrays along the last axis, in rank order.

        Shapes: x (..., sizes[rank]) sharded -> (..., sum(sizes)) replicated.
        """
        if self._transport is None:
            return x
        with self._counted(x) as part:
            rows = math.prod(x.shape[:-1])
            counts = [rows * size for size in sizes]
            joined = np.empty(sum(counts), part.dtype)
            self._transport.allgatherv(part.reshape(-1), joined, counts)
            if rows > 1:
                pieces = np.split(joined, np.cumsum(counts)[:-1])
                joined = np.concatenate(
                    [piece.reshape(rows, -1) for piece in pieces if piece.size], axis=1
                )
            return mx.array(joined.reshape(*x.shape[:-1], sum(sizes)))

    def bcast(self, value: Any, root: int = 0) -> Any:
        """Give every rank the `value` of `root`: an array or a plain object."""
        if self._transport is None:
            return value
        return self._transport.bcast_object(value, root)

    def allgather_objects(self, value: Any) -> list[Any]:
        """Give every rank the plain object of every rank, in rank order."""
        if self._transport is None:
            return [value]
        return self._transport.allgather_objects(value)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self._transport is not None:
            self._transport.barrier()

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Turn a mistake found on any rank into the same `AgreedError` on all.

        For a block without collectives that checks what people gave us: what one
        rank alone sees (a file missing on its host) ends it on every rank.

        Raises: AgreedError for a ValueError or OSError on any rank, with rank and
            host where not all ranks found the same.
        """
        found = None
        try:
            yield
        except (ValueError, OSError) as error:
            found = error
        mine = found and (str(found) or repr(found), self.host)
        reports = self.allgather_objects(mine)
        if all(report is None for report in reports):
            return
        rank, report = next((r, it) for r, it in enumerate(reports) if it is not None)
        message, host = report
        if any(other is None or other[0] != message for other in reports):
            message = f"rank {rank} on {host}: {message}"
        raise AgreedError(message) from found

    def _end_all_ranks(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Print an exception and end every rank: what `world` puts in excepthook."""
        # The others may have failed alike: the first to print ends them all.
        time.sleep(0.5 * min(self.rank, 2))
        text = "".join(traceback.format_exception(kind, error, trace))
        print(f"{text}mlxtp: rank {self.rank} on {self.host} failed: all ranks end",
              file=sys.stderr, flush=True)  # fmt: skip
        assert self._transport is not None
        self._transport.abort()

    @contextmanager
    def _counted(self, x: mx.array) -> Iterator[np.ndarray]:
        """Evaluate `x` and give its memory; count what is done with it as traffic."""
        as_bytes = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
        mx.eval(as_bytes)
        begin = time.perf_counter()
        part = np.ascontiguousarray(np.asarray(as_bytes))
        yield part.view(ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else part
        self.traffic.calls += 1
        self.traffic.bytes += part.nbytes
        self.traffic.seconds += time.perf_counter() - begin

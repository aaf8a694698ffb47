"""The ranks that mpirun has started, through mpi4py."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtp.transports.openmpi import set_defaults

set_defaults()

from mpi4py import MPI  # noqa: E402 - importing it starts MPI


class MPITransport:
    """All ranks of the job as a `MessageTransport`."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size

    def __str__(self) -> str:
        return "mpi4py"

    def send(self, buffer: np.ndarray, to: int, tag: int) -> MPI.Request:
        return self._comm.Isend((buffer, MPI.BYTE), to, tag)

    def prepare_send(self, buffer: np.ndarray, to: int, tag: int) -> MPI.Prequest:
        return self._comm.Send_init((buffer, MPI.BYTE), to, tag)

    def prepare_receive(
        self, buffer: np.ndarray, source: int, tag: int
    ) -> MPI.Prequest:
        return self._comm.Recv_init((buffer, MPI.BYTE), source, tag)

    def start(self, requests: Sequence[MPI.Prequest]) -> None:
        MPI.Prequest.Startall(list(requests))

    def wait(self, requests: Sequence[MPI.Request]) -> None:
        MPI.Request.Waitall(list(requests))

    def wait_some(self, requests: Sequence[MPI.Request]) -> list[int]:
        return MPI.Request.Waitsome(list(requests)) or []

    def free(self, requests: Sequence[MPI.Prequest]) -> None:
        for request in requests:
            request.Free()

    def allgatherv(
        self, send: np.ndarray, receive: np.ndarray, counts: Sequence[int]
    ) -> None:
        aliased = np.may_share_memory(send, receive)
        part = MPI.IN_PLACE if aliased else (send, MPI.BYTE)
        if len(set(counts)) == 1:  # MPI has faster ways for equal parts
            self._comm.Allgather(part, (receive, MPI.BYTE))
        else:
            self._comm.Allgatherv(part, (receive, counts, MPI.BYTE))

    def bcast_object(self, value: Any, root: int) -> Any:
        return self._comm.bcast(value, root)

    def allgather_objects(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def barrier(self) -> None:
        self._comm.Barrier()

    def close(self) -> None:
        if not MPI.Is_finalized():
            MPI.Finalize()

"""The ranks that mpirun has started, through mpi4py."""

import os
from typing import Any

import numpy as np


def _set_defaults() -> None:
    """Set what Open MPI reads when it starts; what the user has set stays."""
    local_ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    if local_ranks > (os.cpu_count() or 1):
        # Ranks that outnumber the cores and poll starve the one they wait for.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


_set_defaults()

from mpi4py import MPI  # noqa: E402 - importing it starts MPI


class MPITransport:
    """All ranks of the job as a `Transport`."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size

    def allgather(self, send: np.ndarray, receive: np.ndarray) -> None:
        self._comm.Allgather(_opaque(send), _opaque(receive))

    def allgatherv(
        self, send: np.ndarray, receive: np.ndarray, counts: list[int]
    ) -> None:
        self._comm.Allgatherv(_opaque(send), (_opaque(receive), counts))

    def alltoallv(
        self, send: np.ndarray, counts: list[int], receive: np.ndarray
    ) -> None:
        mine = [counts[self.rank]] * self.size
        self._comm.Alltoallv((_opaque(send), counts), (_opaque(receive), mine))

    def bcast_object(self, value: Any, root: int) -> Any:
        return self._comm.bcast(value, root)

    def allgather_objects(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def barrier(self) -> None:
        self._comm.Barrier()

    def abort(self) -> None:
        self._comm.Abort(1)


def _opaque(buffer: np.ndarray) -> np.ndarray:
    """The buffer as unsigned integers, which MPI has for every width."""
    return buffer.view(f"u{buffer.itemsize}")

"""Smaller worlds, of some of the ranks that the tests run on."""

from mlxtp import Communicator
from mlxtp.comm.transports.mpi import MPITransport


class Part(MPITransport):
    """All ranks that give the same color, which the whole world outlives."""

    def __init__(self, color: int) -> None:
        super().__init__()
        self._comm = self._comm.Split(color)
        self.rank, self.size = self._comm.rank, self._comm.size

    def close(self) -> None:
        """Leave MPI to the world."""


def parted(color: int) -> Communicator:
    """The world of all ranks that give this `color`; every rank has to call it."""
    return Communicator(Part(color), measure=False, heartbeat=False)

"""The ranks that mpirun has started, through mpi4py."""

import atexit
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import mpi4py
import numpy as np

from mlxtp.comm.transports.openmpi import YIELDS, abandon, finish, set_defaults

set_defaults()
# mpi4py would end MPI also where a rank is lost, and wait for it.
mpi4py.rc.finalize = False
atexit.register(finish)

from mpi4py import MPI  # noqa: E402 - importing it starts MPI

# Polls that only yield, for what comes soon; then each is followed by a nap.
YIELDING_POLLS = 100
NAP_SECONDS = 50e-6

# Messages of unlike sizes have unlike tags, so that they wait for each other in vain:
# Open MPI 5.0.11 writes one that is too long beyond the buffer that waits for it.
MARKS = 1021

# How long a nap of `wait_napping` is, as a part of the time that it has waited.
NAP_PART = 0.02


class MPITransport:
    """All ranks of the job as a `MessageTransport`."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        # Ranks outnumber the cores: one that waits is in the way of one that computes.
        self.crowded = os.environ.get(YIELDS) == "1"
        self.raise_if_lost: Callable[[], None] = lambda: None
        self._abandoned: list[MPI.Request] = []

    def __str__(self) -> str:
        """Name the transport, for `Communicator.describe`."""
        return "mpi4py"

    def send(self, buffer: np.ndarray, to: int, tag: int) -> MPI.Request:
        """Begin to send; the buffer stays as it is until the request is done."""
        return self._comm.Isend((buffer, MPI.BYTE), to, _marked(tag, buffer))

    def prepare_send(self, buffer: np.ndarray, to: int, tag: int) -> MPI.Prequest:
        """Make a persistent send."""
        return self._comm.Send_init((buffer, MPI.BYTE), to, _marked(tag, buffer))

    def prepare_receive(
        self, buffer: np.ndarray, source: int, tag: int
    ) -> MPI.Prequest:
        """Make a persistent receive."""
        return self._comm.Recv_init((buffer, MPI.BYTE), source, _marked(tag, buffer))

    def start(self, requests: Sequence[MPI.Prequest]) -> None:
        """Begin prepared requests."""
        MPI.Prequest.Startall(list(requests))

    def wait(self, requests: Sequence[MPI.Request]) -> None:
        """Wait until all are done; make room for others where cores are shared."""
        requests = list(requests)
        if not self.crowded:
            MPI.Request.Waitall(requests)
            return
        polls = 0
        while not MPI.Request.Testall(requests):
            polls += 1
            self._look(requests)
            _make_room(polls)

    def wait_napping(
        self, requests: Sequence[MPI.Request], longest_nap_seconds: float
    ) -> None:
        """Wait until all are done; sleep between looking and looking again."""
        requests = list(requests)
        begin = time.monotonic()
        while not MPI.Request.Testall(requests):
            self._look(requests)
            nap = NAP_PART * (time.monotonic() - begin)
            time.sleep(min(max(nap, NAP_SECONDS), longest_nap_seconds))

    def wait_some(self, requests: Sequence[MPI.Request]) -> list[int]:
        """Wait until at least one is done; return the places of those that now are."""
        requests = list(requests)
        if not self.crowded:
            return MPI.Request.Waitsome(requests) or []
        polls = 0
        while not (done := MPI.Request.Testsome(requests)):
            polls += 1
            self._look(requests)
            _make_room(polls)
        return done

    def _look(self, requests: Sequence[MPI.Request]) -> None:
        """Raise if a rank is lost; MPI may still write where the requests say."""
        try:
            self.raise_if_lost()
        except Exception:
            self._abandoned += requests
            raise

    def free(self, requests: Sequence[MPI.Prequest]) -> None:
        """Give up prepared requests."""
        for request in requests:
            request.Free()

    def bcast_object(self, value: Any, root: int) -> Any:
        """Give every rank the object of `root`."""
        return self._comm.bcast(value, root)

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the object of every rank, in rank order."""
        return self._comm.allgather(value)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._comm.Barrier()

    def is_over(self) -> bool:
        """Whether this rank has ended MPI."""
        return bool(MPI.Is_finalized())

    def handle(self) -> int:
        """Return where C finds the handle of MPI's communicator."""
        return MPI._addressof(self._comm)

    def lacks_for_native(self, library_version: str) -> str | None:
        """Return why the native core, which has found this library, cannot be used."""
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return "this MPI has no MPI_THREAD_MULTIPLE, which threads of C++ need"
        if library_version != MPI.Get_library_version():
            return (
                "mpi4py has loaded another MPI than the one of mpicxx: put the mpicxx "
                "of mpi4py's MPI first in PATH"
            )
        return None

    def close(self) -> None:
        """End MPI, with all ranks."""
        finish()

    def abandon(self) -> None:
        """Let this process end without the other ranks."""
        abandon()


def _marked(tag: int, buffer: np.ndarray) -> int:
    return tag * MARKS + buffer.nbytes % MARKS


def _make_room(polls: int) -> None:
    if polls < YIELDING_POLLS:
        os.sched_yield()
    else:
        time.sleep(NAP_SECONDS)

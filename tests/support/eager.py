"""The collectives of `--transport mpi-eager` beside those that the tests run over."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from mlxtp import Communicator
from mlxtp.comm.eager import EagerCollectives


@contextmanager
def over_eager(comm: Communicator) -> Iterator[None]:
    """Make the collectives of `comm` those of `mpi-eager` in the block.

    Models that are loaded take them as well; heartbeat and traffic stay the same.
    """
    if comm.size == 1:  # it has none
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "_arrays", _eager(comm))
        yield


@cache
def _eager(comm: Communicator) -> EagerCollectives:
    from mlxtp.comm.transports.mpi import MPITransport

    return EagerCollectives(MPITransport(), comm._progress, comm.traffic, measure=False)

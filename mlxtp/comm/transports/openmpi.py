"""The settings of Open MPI, made before it starts, and its end."""

import os
import sys

from mlxtp.cluster.addresses import (
    RING_NETWORK,
    WITHOUT_CABLES,
    ring_address,
    uses_cables,
)
from mlxtp.cluster.cables import interfaces

# A message up to here goes out at once; a larger one asks the receiver first, which
# costs a round trip. `gathers.PIECE_BYTES` stays below.
EAGER_BYTES = 1024 * 1024

# Where it is 1, ranks that wait make room for others on the same cores.
YIELDS = "OMPI_MCA_mpi_yield_when_idle"

# Longer than the others take to say who is missing.
ABORT_DELAY_SECONDS = 3

_is_abandoned = False


def set_defaults() -> None:
    """Set the variables that Open MPI reads in MPI_Init; what the user has set stays.

    They concern ranks alone: what `mpirun` reads has to be set around it.
    """
    defaults = {
        "btl_tcp_eager_limit": EAGER_BYTES,
        "btl_tcp_rndv_eager_limit": EAGER_BYTES,
        # Where a connection breaks, Open MPI ends the rank at once, before it can be
        # seen which rank was the first to go.
        "mpi_abort_delay": ABORT_DELAY_SECONDS,
    }
    local_ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    if local_ranks > (os.cpu_count() or 1):
        # Ranks that outnumber the cores and poll starve the one they wait for.
        os.environ.setdefault(YIELDS, "1")
    if (address := ring_address()) is not None:
        # The two ends of a cable know each other alone: of all its addresses a host
        # may name only the one that everybody has a route to. All its ports have that;
        # one that is up is named, and routes decide where data go. Over the four of a
        # mesh Open MPI 5.0.11 hangs with the first message that does not go out at
        # once.
        include = "OMPI_MCA_btl_tcp_if_include"
        if os.environ.get(include, RING_NETWORK) == RING_NETWORK:
            os.environ[include] = interfaces(up=True).get(address, RING_NETWORK)
    elif not uses_cables() and "OMPI_MCA_btl_tcp_if_include" not in os.environ:
        os.environ.setdefault("OMPI_MCA_btl_tcp_if_exclude", WITHOUT_CABLES)
    for name, value in defaults.items():
        os.environ.setdefault(f"OMPI_MCA_{name}", str(value))


def is_started() -> bool:
    """Whether mpi4py has started MPI in this process."""
    return "mpi4py.MPI" in sys.modules


def abandon() -> None:
    """Let this process end without ending MPI, which waits for all ranks."""
    global _is_abandoned
    _is_abandoned = True


def finish() -> None:
    """End MPI, with all ranks, where mpi4py has started it in this process."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_finalized() and not _is_abandoned:
        mpi.Finalize()

"""Texts that ranks leave for each other with mpirun, over its own channel.

mpirun has reached every host by that channel to start the ranks, so it works even
where MPI's data, which take other links, do not pass. Importing this starts MPI and
sends nothing over it.
"""

import re
import time

from mlxtp.comm.transports.openmpi import set_defaults

set_defaults()

from mpi4py import MPI  # noqa: E402 - importing it starts MPI

POLL_SECONDS = 0.05


def size() -> int:
    """Return how many ranks MPI knows of."""
    return int(MPI.COMM_WORLD.size)


def library_version() -> str:
    """Return the version of MPI's library."""
    words = MPI.Get_library_version()
    number = re.search(r"v?(\d+(\.\d+)+)", words)
    return number[1] if number else words.split(",")[0]


def publish(name: str, words: str) -> None:
    """Leave `words` under `name`, for all ranks of this job."""
    MPI.Publish_name(name, words)


def lookup(name: str, seconds: float) -> str:
    """Wait for what is left under `name`, and return it.

    Raises: TimeoutError if nothing is left within `seconds`.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return str(MPI.Lookup_name(name))
        except MPI.Exception:
            if time.monotonic() > until:
                raise TimeoutError(f"nothing was published as {name}") from None
        time.sleep(POLL_SECONDS)

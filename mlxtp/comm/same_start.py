"""Whether all ranks of a program were started alike."""

from collections.abc import Sequence
from importlib.metadata import version

from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError


def check_same_start(comm: Communicator, arguments: Sequence[str]) -> None:
    """Compare the ranks' command lines and the versions of their packages.

    Communicates: one allgather of objects.

    Raises: UsageError, with the first rank that differs from rank 0, and in what.
    """
    mine = {
        "arguments": " ".join(arguments),
        "version of mlxtp": version("mlxtp"),
        "version of mlx": version("mlx"),
        "version of mlx-lm": version("mlx-lm"),
    }
    starts = comm.allgather_object((comm.host, mine))
    first_host, first = starts[0]
    for rank, (host, start) in enumerate(starts):
        for what, value in start.items():
            if value != first[what]:
                raise UsageError(
                    f"the ranks do not start alike: {what} {first[what]!r} on rank 0 "
                    f"({first_host}), {value!r} on rank {rank} ({host})"
                )

"""Starting the native core on all ranks, or on none."""

import socket
import sys
from contextlib import suppress
from typing import Any

from mlxtp.comm.transports import MessageTransport
from mlxtp.native.build import BuildError, collectives, reading
from mlxtp.native.loader import load


def start(control: MessageTransport) -> list[Any] | None:
    """Return two of this rank's `Core` of C++; None where any rank cannot have them.

    The second is for collectives that are made beside those of the first. Where there
    are none rank 0 has said so: one line on standard error, with the host and what to
    do. What reads checkpoints is compiled here as well, where ranks wait for a compiler
    anyway.

    Communicates: one allgather of objects, and two duplicates of the communicator.
    """
    host = socket.gethostname()
    native: Any = None
    lacking = None

    def say(line: str) -> None:
        print(f"mlxtp: {host}: {line}", file=sys.stderr)

    try:
        native = load(collectives(), say)
        # Without it checkpoints are read more slowly.
        with suppress(BuildError, OSError, ImportError):
            load(reading(), say)
        lacking = control.lacks_for_native(native.library_version())
    except (BuildError, OSError, ImportError) as error:
        lacking = str(error)
    reports = control.allgather_object(lacking and f"{host}: {lacking}")
    lacks = [report for report in reports if report]
    if not lacks:
        return [native.Core(control.handle(), control.crowded) for _ in range(2)]
    if control.rank == 0:
        line = f"mlxtp: collectives go over mpi-eager, which is slower. {lacks[0]}"
        print(line, file=sys.stderr)
    return None

"""A limit on the start of MPI, in which no Python runs until all ranks have come."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Python and its imports take a while, and on one host longer than on another.
LEAST_SECONDS = 10.0

# A process of its own: it ends when its input does, or ends this one.
GUARD = f"""
import os, select, sys
seconds, process, words = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    os.write(2, words.encode())
    os.kill(int(process), {int(signal.SIGKILL)})
"""


@contextmanager
def limited_start(seconds: float, after: float = 0.0) -> Iterator[None]:
    """End this process, with a message, if MPI does not start within `seconds`, or 10.

    `after` is how much later than the first this rank does: that one ends them all.
    """
    if "mpi4py.MPI" in sys.modules:
        yield
        return
    seconds = max(seconds, LEAST_SECONDS)
    words = (
        f"mlxtp: MPI did not start on {socket.gethostname()} within {seconds:g} s: "
        "a rank has not come, or its host is not reached\n"
    )
    command = [sys.executable, "-I", "-S", "-c", GUARD]
    command += [str(seconds + after), str(os.getpid()), words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as guard:
        assert guard.stdin is not None
        yield
        guard.stdin.close()

"""What mpirun tells a rank, and how a program of many ranks starts and ends."""

import argparse
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from mlxtp.cluster.job import INPUT_VARIABLE
from mlxtp.cluster.verdict import RankOnHost, Verdict
from mlxtp.comm.ending import text_of
from mlxtp.comm.errors import UsageError
from mlxtp.comm.transports.openmpi import finish, is_started

# Where launchers tell a rank its number, and how many there are.
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# How much later than the others rank 0 ends when something is wrong.
LAST_SECONDS = 0.5

# Python and its imports take a while, and on one host longer than on another.
LEAST_START_SECONDS = 10.0

# A process of its own: it ends when its input does, or ends this one.
GUARD = f"""
import os, select, sys
seconds, process, words = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    os.write(2, words.encode())
    os.kill(int(process), {int(signal.SIGKILL)})
"""


def size() -> int:
    """Return how many ranks mpirun has started; 0 without mpirun."""
    return _largest(SIZES)


def rank() -> int:
    """Return this rank's number, as mpirun tells it; 0 without mpirun."""
    return _largest(RANKS)


def input_bytes() -> int | None:
    """Return how long the standard input of rank 0 is; None if nobody has said.

    Under mpirun it has no end that a rank could read up to. Without mpirun it has one,
    and what the variable says was meant for another program.

    Raises: UsageError if the variable holds no number.
    """
    given = os.environ.get(INPUT_VARIABLE)
    if not (size() and given):
        return None
    if not given.isdecimal():
        raise UsageError(f"{INPUT_VARIABLE} is {given!r}: wanted a number of bytes")
    return int(given)


def report_delay_seconds() -> float:
    """Delay so that the lowest rank reports a shared error first, and ends the job."""
    return 0.5 * min(rank(), 2)


def _largest(names: tuple[str, ...]) -> int:
    return max(int(os.environ.get(name, "0")) for name in names)


@contextlib.contextmanager
def limited_start(seconds: float) -> Iterator[None]:
    """End all ranks, with a message, if MPI does not start in this block.

    `seconds` is the limit, which is never below `LEAST_START_SECONDS`. MPI starts when
    all ranks have come, and mpi4py lets no thread of Python run until then; so a
    process of its own keeps the limit.
    """
    if is_started():
        yield
        return
    seconds = max(seconds, LEAST_START_SECONDS)
    reporter = RankOnHost(rank(), socket.gethostname())
    words = text_of(Verdict("not started", (), reporter, None, seconds)) + "\n"
    command = [sys.executable, "-I", "-S", "-c", GUARD]
    command += [str(seconds + report_delay_seconds()), str(os.getpid()), words]
    # Leaving the block closes its input, and waits for it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL):
        yield


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> argparse.Namespace:
    """Parse the command line, the same on all ranks; rank 0 alone prints.

    Raises: SystemExit for --help and for mistakes, as argparse does.
    """
    nowhere = io.StringIO()
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            return parser.parse_args(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    leave(status)


def replace_unprintable() -> None:
    """Let standard output show a `?` for what its encoding lacks, and raise nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def refuse(program: str, error: Exception) -> NoReturn:
    """End all ranks with a person's mistake: one line from rank 0, and status 2."""
    if rank() == 0:
        line = " ".join(part.strip() for part in str(error).splitlines())
        print(f"{program}: error: {line}", file=sys.stderr)
    leave(2)


def leave(status: int) -> NoReturn:
    """End this rank, as all ranks do at once; rank 0 ends last, with `status`.

    The others end with 0: mpirun 5.0.11 over several hosts crashes or hangs in four of
    ten jobs whose ranks all end with another status than 0 at once. Over mpi4py they
    leave Python no time to tidy up: mpirun has more to say where they are still there.
    """
    if size():
        finish()
        if rank() > 0:
            status = 0
            if is_started():
                _flush()
                os._exit(0)
        elif status:
            time.sleep(LAST_SECONDS)
    sys.exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # one that is closed
            stream.flush()

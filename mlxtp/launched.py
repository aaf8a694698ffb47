"""What mpirun tells a rank, and how a program of many ranks ends."""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from mlxtp.transports.openmpi import finish

# Where launchers tell a rank its number, and how many there are.
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# How much later than the others rank 0 ends when something is wrong.
LAST_SECONDS = 0.5


def size() -> int:
    """The number of ranks that mpirun started this one among; 0 without mpirun."""
    return _largest(SIZES)


def rank() -> int:
    """This rank's number, as mpirun tells it; 0 without mpirun."""
    return _largest(RANKS)


def later_seconds() -> float:
    """How long this rank leaves it to lower ones to say what all ranks see."""
    return 0.5 * min(rank(), 2)


def _largest(names: tuple[str, ...]) -> int:
    return max(int(os.environ.get(name, "0")) for name in names)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> argparse.Namespace:
    """Parse the command line, the same on all ranks; rank 0 alone prints.

    For --help and for mistakes the program ends, as argparse has it.
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


def leave(status: int) -> NoReturn:
    """End all ranks, which all call it, with a status that is rank 0's alone, last.

    mpirun 5.0.11 over several hosts crashes or hangs in four of ten jobs whose ranks
    all end with another status than 0 at once.
    """
    if size():
        finish()
        if rank() > 0:
            status = 0
        elif status:
            time.sleep(LAST_SECONDS)
    sys.exit(status)

"""The lines that the server prints about itself, on standard error."""

import contextlib
import shlex
import sys
from collections.abc import Sequence


def say(words: str) -> None:
    """Print a line of the server's log."""
    _print(f"mlxtp.serve: {words}")


def say_line(command: Sequence[str]) -> None:
    """Print the command line that is run."""
    _print(shlex.join(command))


def _print(line: str) -> None:
    # A server whose log nobody takes any more goes on.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)

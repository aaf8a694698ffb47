"""A server of our own: started, asked for its address, and ended."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mlxtp.chat.client import ServerError, printable

PROGRAM = (sys.executable, "-m", "mlxtp.serve")

# How it tells where it listens.
_ADDRESS = re.compile(r"mlxtp\.serve: (https?://[^\s,]+)")

# It lets its requests end, and then all ranks.
END_SECONDS = 60.0


class Server:
    """`python -m mlxtp.serve` with these arguments, on a free port of this machine.

    It is a session of its own: Ctrl+C in the terminal stops an answer, not the server.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [*PROGRAM, "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._last_lines: deque[str] = deque(maxlen=20)
        self._address = ""
        self._has_told = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Read all that it prints, so that it never waits for a reader."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last_lines.append(printable(line).rstrip())
            if match := _ADDRESS.search(line):
                self._address = match[1]
                self._has_told.set()
        self._has_told.set()

    def address(self) -> str:
        """Wait until it listens, and return where.

        Raises: ServerError with its last line, if it ends before.
        """
        self._has_told.wait()
        if not self._address:
            raise ServerError(self.last_words())
        return self._address

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether its process is over, or is so within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def last_words(self) -> str:
        """Say how it has ended: its status and its last line, or lines if it broke."""
        status = self._process.wait()
        self._reader.join(1.0)  # a rank that is left may hold its output open
        lines = [line for line in self._last_lines if line] or ["it said nothing"]
        said = lines[-1] if status in (0, 2) else "\n" + "\n".join(lines)
        return f"the server ended with status {status}: {said}"

    def end(self) -> None:
        """End it and its ranks, in order; kill what has not ended after a while."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def explained(server: Server | None, seconds: float = 0.0) -> Iterator[None]:
    """Where a server of our own has ended, say how: that is why it gives no answer.

    `seconds` is how long its end may take after it gave none.
    """
    try:
        yield
    except ServerError:
        if server is None or not server.has_ended(seconds):
            raise
        raise ServerError(server.last_words()) from None

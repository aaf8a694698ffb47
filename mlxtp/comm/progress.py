"""Which collective this rank is in: what it tells the others with its heartbeat."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlxtp.cluster.verdict import CollectiveCall


class Progress:
    """The collectives that the main thread has called; other threads may read it.

    `number` counts them; `waiting_since` is when the wait in the current one began
    (seconds of the monotonic clock), None outside; `limited` says whether waits have
    a limit of time.
    """

    def __init__(self) -> None:
        self.number = 0
        self.waiting_since: float | None = None
        self.limited = True
        # One assignment, so that a reader never sees parts of two calls.
        self._last: tuple[str, int | None, str] | None = None

    def last_call(self) -> CollectiveCall | None:
        """Return the last collective that was called; None before the first."""
        if self._last is None:
            return None
        return CollectiveCall(*self._last, waiting=self.waiting_since is not None)

    @contextmanager
    def collective(self, name: str, layer: str = "") -> Iterator[None]:
        """Note that the main thread is in a collective, for the block."""
        self.number += 1
        self._last = name, self.number, layer
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    def put_in_graph(self, name: str, layer: str) -> None:
        """Note a collective that MLX will wait for when it evaluates the graph."""
        self._last = name, None, layer

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let waits in the block take as long as they take, while ranks load, say."""
        before, self.limited = self.limited, False
        try:
            yield
        finally:
            self.limited = before

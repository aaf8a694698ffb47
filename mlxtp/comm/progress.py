"""What this rank does, as it tells the others with its heartbeat."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlxtp.cluster.verdict import CollectiveCall


class Blocks(NamedTuple):
    """How many blocks, such as forward passes, a rank has left, and how.

    `ended` counts all, `raised` those that an exception ended; `raised_at` is how many
    collectives the rank had begun at the last exception.
    """

    ended: int = 0
    raised: int = 0
    raised_at: int = 0


class Progress:
    """The collectives that the main thread has called; other threads may read it.

    `number` counts them; `waiting_since` is when the wait in the current one began
    (seconds of the monotonic clock), None outside; `limited` says whether waits have
    a limit of time. `blocks` are those of `Communicator.raising_together`.
    """

    def __init__(self) -> None:
        self.number = 0
        self.waiting_since: float | None = None
        self.limited = True
        self.blocks = Blocks()
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

    def end_block(self, *, raised: bool) -> None:
        """Note that the main thread has left a block, with an exception or not."""
        ended, number, at = self.blocks
        if raised:
            number, at = number + 1, self.number
        # One assignment: a reader never sees a block that has ended but not raised.
        self.blocks = Blocks(ended + 1, number, at)

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let waits in the block take as long as they take, while ranks load, say."""
        before, self.limited = self.limited, False
        try:
            yield
        finally:
            self.limited = before

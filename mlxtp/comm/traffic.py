"""What a rank's collectives on arrays cost."""

from collections.abc import Callable


class Traffic:
    """Collectives on arrays since the last `reset`.

    `calls` and `bytes` count them when they are called, whether or not MLX has come to
    them. `bytes` is the size of this rank's own parts, and of what it gives or gets in
    a broadcast. `seconds` runs from the moment the rank's part is computed, so it
    counts waiting for slower ranks; over mpi-eager it counts, of a nonblocking
    collective, what its start and its `wait` take. MLX's backends time nothing.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0
        self._seconds = 0.0
        self._in_graph: Callable[[], float] = float

    @property
    def seconds(self) -> float:
        """How long this rank was in collectives."""
        return self._seconds + self._in_graph()

    def add_graph(self, seconds: Callable[[], float]) -> None:
        """Let what `seconds` returns count as well: how long all in the graph took."""
        self._in_graph = seconds
        self._seconds -= seconds()

    def count(self, nbytes: int, seconds: float = 0.0) -> None:
        """Add a collective with a part of `nbytes`."""
        self.calls += 1
        self.bytes += nbytes
        self.add_seconds(seconds)

    def add_seconds(self, seconds: float) -> None:
        """Add seconds of a collective that has been counted."""
        self._seconds += seconds

    def reset(self) -> None:
        """Begin to count again from zero."""
        self.calls, self.bytes, self._seconds = 0, 0, -self._in_graph()

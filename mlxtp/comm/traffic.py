"""What a rank's collectives on arrays cost."""

from dataclasses import dataclass


@dataclass
class Traffic:
    """Collectives on arrays since the last `reset`.

    `bytes` is the size of this rank's own parts, and of what it gives or gets in a
    broadcast. `seconds` runs from the moment the
    rank's part is computed, so it counts waiting for slower ranks; of a nonblocking
    collective it counts what its start and its `wait` take. Collectives in MLX's
    graph are not timed, and `bytes` counts them as they are put there.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def count(self, nbytes: int, seconds: float) -> None:
        """Add a collective with a part of `nbytes`."""
        self.calls += 1
        self.bytes += nbytes
        self.seconds += seconds

    def reset(self) -> None:
        """Begin to count again from zero."""
        self.calls, self.bytes, self.seconds = 0, 0, 0.0

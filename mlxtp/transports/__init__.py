"""How bytes get to the other ranks. What is above names no message library."""

from typing import Any, Protocol

import numpy as np


class Transport(Protocol):
    """Moves buffers and plain objects between the ranks of one job.

    Buffers are contiguous arrays, sent as the bytes that they are. Every rank
    makes the same calls in the same order.
    """

    rank: int
    size: int

    def allgather(self, send: np.ndarray, receive: np.ndarray) -> None:
        """Put every rank's `send` (n,) into the rows of `receive` (size, n)."""
        ...

    def allgatherv(
        self, send: np.ndarray, receive: np.ndarray, counts: list[int]
    ) -> None:
        """Put every rank's `send` (counts[rank],) after another in `receive`."""
        ...

    def alltoallv(
        self, send: np.ndarray, counts: list[int], receive: np.ndarray
    ) -> None:
        """Send counts[i] elements to rank i; row i of `receive` is rank i's part."""
        ...

    def bcast_object(self, value: Any, root: int) -> Any: ...

    def allgather_objects(self, value: Any) -> list[Any]: ...

    def barrier(self) -> None: ...

    def abort(self) -> None:
        """End all ranks at once."""
        ...

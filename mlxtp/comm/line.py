"""A line to rank 0 that does not need what is examined.

MPI's data take the cables, so a broken cable would end a job before it could tell.
mpirun has a channel of its own (it started the ranks through it): by that rank 0 lets
the others know its addresses, all of them, and they call at the first that answers.
Python's `multiprocessing.connection` would frame the messages, but waits without a time
limit within one: a link that breaks there would hold up the doctor.
"""

import json
import pickle
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from mlxtp.cluster.addresses import RING_ADDRESSES

CALL_SECONDS = 3.0
CLOCK_READINGS = 8
LENGTH = struct.Struct("!Q")
RANK = struct.Struct("!I")

# Puts a text where all ranks find it, and finds it.
Publish = Callable[[str], None]
Lookup = Callable[[float], str]


class LostError(Exception):
    """A rank is not there, or does not answer any more."""


class Line:
    """Plain objects between the ranks, all through rank 0, each within a time limit.

    Every rank makes the same calls in the same order.

    Raises: LostError, on rank 0 with the ranks that are missing, for every call.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        addresses: Sequence[str] = (),
        publish: Publish | None = None,
        lookup: Lookup | None = None,
        timeout_seconds: float = 0.0,
    ) -> None:
        """Connect to rank 0, which publishes its addresses for all ranks.

        `addresses` are this rank's, of all interfaces. `publish` leaves a text where
        all ranks find it, and `lookup` waits for it, so many seconds. One rank needs
        none of them.

        Raises: LostError if a rank does not come within `timeout_seconds`.
        """
        self.rank, self.size = rank, size
        self._timeout = timeout_seconds
        self._lines: dict[int, socket.socket] = {}
        self._names = {rank: socket.gethostname()}
        if size == 1:
            return
        assert publish is not None and lookup is not None
        if rank == 0:
            self._listen(addresses, publish)
        else:
            self._call(json.loads(lookup(timeout_seconds)))

    def _listen(self, addresses: Sequence[str], publish: Publish) -> None:
        key = secrets.token_bytes(16)
        # The cables last: it is they that may be broken.
        others = sorted(set(addresses), key=RING_ADDRESSES.__contains__)
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            publish(json.dumps([[*others, "127.0.0.1"], port, key.hex()]))
            until = time.monotonic() + self._timeout
            while len(self._lines) < self.size - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                try:
                    line, _ = server.accept()
                    line.settimeout(CALL_SECONDS)
                    if _exactly(line, len(key)) == key:
                        [rank] = RANK.unpack(_exactly(line, RANK.size))
                        self._take(rank, line)
                        line.sendall(key)
                except (OSError, LostError):
                    if time.monotonic() > until:
                        break
        missing = [r for r in range(1, self.size) if r not in self._lines]
        if missing:
            ranks = ", ".join(f"rank {rank}" for rank in missing)
            tried = ", ".join(others)
            raise LostError(
                f"{ranks} of {self.size} did not call rank 0 on {self._names[0]} "
                f"within {self._timeout:g} s, at none of {tried}"
            )
        for rank, line in self._lines.items():
            self._names[rank] = self._receive(rank, line)

    def _call(self, published: tuple[list[str], int, str]) -> None:
        addresses, port, key = published[0], published[1], bytes.fromhex(published[2])
        for address in addresses:
            try:
                line = socket.create_connection((address, port), CALL_SECONDS)
                line.sendall(key + RANK.pack(self.rank))
                if _exactly(line, len(key)) == key:
                    self._take(0, line)
                    break
            except (OSError, LostError):
                continue
        else:
            raise LostError(f"rank 0 does not answer at {', '.join(addresses)}")
        self._send(0, self._lines[0], self._names[self.rank])

    def _take(self, rank: int, line: socket.socket) -> None:
        line.settimeout(self._timeout)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines[rank] = line

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the object of every rank, in rank order."""
        if self.rank > 0:
            self._send(0, self._lines[0], value)
            everyones: list[Any] = self._receive(0, self._lines[0])
            return everyones
        values = [value]
        for rank in range(1, self.size):
            values.append(self._receive(rank, self._lines[rank]))
        for rank, line in self._lines.items():
            self._send(rank, line, values)
        return values

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.allgather_object(None)

    def clocks(self) -> list[float]:
        """Return by how many seconds each rank's clock is ahead of rank 0's."""
        ahead = [0.0]
        for rank in range(1, self.size):
            best = (float("inf"), 0.0)
            for _ in range(CLOCK_READINGS):
                if self.rank == 0:
                    before = time.time()
                    self._send(rank, self._lines[rank], None)
                    there = self._receive(rank, self._lines[rank])
                    after = time.time()
                    best = min(best, (after - before, there - (before + after) / 2))
                elif self.rank == rank:
                    self._receive(0, self._lines[0])
                    self._send(0, self._lines[0], time.time())
            ahead.append(best[1])
        of_rank_0: list[float] = self.allgather_object(ahead)[0]
        return of_rank_0

    def close(self) -> None:
        """Close the connections of this rank."""
        for line in self._lines.values():
            line.close()

    def _send(self, rank: int, line: socket.socket, value: Any) -> None:
        content = pickle.dumps(value)
        try:
            line.sendall(LENGTH.pack(len(content)) + content)
        except OSError as error:
            raise self._lost(rank, error) from error

    def _receive(self, rank: int, line: socket.socket) -> Any:
        try:
            [length] = LENGTH.unpack(_exactly(line, LENGTH.size))
            return pickle.loads(_exactly(line, length))
        except (OSError, LostError) as error:
            raise self._lost(rank, error) from error

    def _lost(self, rank: int, error: Exception) -> LostError:
        host = f" on {self._names[rank]}" if rank in self._names else ""
        silent = isinstance(error, TimeoutError)
        how = f"did not answer for {self._timeout:g} s" if silent else "has ended"
        return LostError(f"rank {rank}{host} {how}")


def _exactly(line: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = line.recv(min(count, 1 << 20))
        if not part:
            raise LostError("closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)

"""Whether ranks reach each other on the links of their data, and how fast."""

import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

from mlxtp.comm.line import Line

# How long to wait for a connection, and for bytes on one.
REACH_SECONDS = 2.0
STALL_SECONDS = 3.0
# A latency is that of the quickest of so many round trips, in at most so many seconds.
ROUND_TRIPS = 20
ROUND_TRIP_SECONDS = 0.2
# The time around the ring is that of the quickest of so many laps.
LAPS = 3
# A rate is measured by sending blocks for so long.
BURST_SECONDS = 0.15
BLOCK_BYTES = 256 * 1024
RANK = struct.Struct("!I")


@dataclass(frozen=True)
class Link:
    """The link between two ranks.

    `latency_seconds` is half of the quickest round trip. `bytes_per_second` is the rate
    of long messages; None where short messages pass and long ones do not.
    """

    latency_seconds: float
    bytes_per_second: float | None

    def better(self, other: "Link") -> "Link":
        """Return the better figures of two measurements: noise makes them worse."""
        rates = [self.bytes_per_second or 0.0, other.bytes_per_second or 0.0]
        latency = min(self.latency_seconds, other.latency_seconds)
        return Link(latency, max(rates) or None)


@dataclass(frozen=True)
class Ring:
    """All ranks in order, each sending to the next.

    `seconds` is the time of a message once around. `bytes_per_second` is the rate of
    the slowest rank when all send to the next one at once.
    """

    seconds: float
    bytes_per_second: float


class Sockets:
    """Connections from a rank to the others, as far as they can be reached.

    `reached` are the pairs of ranks with a connection.
    """

    def __init__(self, line: Line, address: str) -> None:
        """Connect to all ranks that can be reached.

        Args:
            line: to exchange addresses and results.
            address: this rank's, under which the others reach it.
        """
        self._line = line
        self.rank, self.size = line.rank, line.size
        self._to: dict[int, socket.socket] = {}
        with socket.create_server((address, 0)) as server:
            servers = line.allgather_object(server.getsockname())
            threads = [
                threading.Thread(
                    target=self._connect, args=(rank, address, servers[rank])
                )
                for rank in range(self.rank)
            ]
            for thread in threads:
                thread.start()
            self._accept(server)
            for thread in threads:
                thread.join()
        reached = line.allgather_object(set(self._to))
        self.reached = {
            (a, b)
            for a, b in combinations(range(self.size), 2)
            if b in reached[a] and a in reached[b]
        }

    def _connect(self, rank: int, address: str, server: tuple[str, int]) -> None:
        with suppress(OSError):
            connection = socket.create_connection(server, REACH_SECONDS, (address, 0))
            connection.sendall(RANK.pack(self.rank))
            self._keep(rank, connection)

    def _accept(self, server: socket.socket) -> None:
        until = time.monotonic() + REACH_SECONDS + 0.5
        callers = self.size - 1 - self.rank
        while callers and (rest := until - time.monotonic()) > 0:
            server.settimeout(rest)
            with suppress(OSError):
                connection, _ = server.accept()
                connection.settimeout(REACH_SECONDS)
                [rank] = RANK.unpack(_receive(connection, RANK.size))
                self._keep(rank, connection)
                callers -= 1

    def _keep(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(STALL_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._to[rank] = connection

    def measure(self, pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Link]:
        """Measure those of `pairs` that are reached, one after the other.

        Every rank calls it with the same pairs and gets the same links. A link over
        which long messages do not pass is not measured again.
        """
        links = {}
        for a, b in sorted(self.reached.intersection(pairs)):
            mine = None
            if self.rank == a:
                mine = _measure(self._to[b])
            elif self.rank == b:
                _answer(self._to[a])
            link = self._line.allgather_object(mine)[a]
            if link is not None:
                links[a, b] = link
            if link is None or link.bytes_per_second is None:
                self.reached.discard((a, b))  # bytes may still be on their way
        return links

    def ring(self) -> Ring | None:
        """Measure the ring; None unless every rank reaches the next."""
        pairs = {_pair(rank, (rank + 1) % self.size) for rank in range(self.size)}
        if self.size < 2 or not pairs <= self.reached:
            return None
        following = self._to[(self.rank + 1) % self.size]
        previous = self._to[(self.rank - 1) % self.size]
        lap: float | None = None
        rate: float | None = None
        with suppress(OSError):
            lap = self._laps(following, previous)
        if None in self._line.allgather_object(lap):
            return None
        with suppress(OSError):
            rate = _send_and_receive(following, previous)
        laps, rates = zip(*self._line.allgather_object((lap, rate)), strict=True)
        return None if None in rates else Ring(laps[0], min(rates))

    def _laps(self, following: socket.socket, previous: socket.socket) -> float:
        """Seconds of the quickest lap, as rank 0 sees it."""
        quickest = float("inf")
        for _ in range(LAPS):
            begin = time.perf_counter()
            if self.rank == 0:
                following.sendall(b"?")
                _receive(previous, 1)
            else:
                _receive(previous, 1)
                following.sendall(b"?")
            quickest = min(quickest, time.perf_counter() - begin)
        return quickest

    def close(self) -> None:
        """Close all connections."""
        for connection in self._to.values():
            connection.close()


def _measure(connection: socket.socket) -> Link | None:
    """Measure a link, as the lower rank does."""
    try:
        seconds = _round_trip(connection)
    except OSError:
        return None
    try:
        _send_burst(connection)
        [rate] = struct.unpack("!d", _receive(connection, 8))
        return Link(seconds / 2, rate)
    except OSError:
        return Link(seconds / 2, None)


def _answer(connection: socket.socket) -> None:
    """Answer round trips and report the rate of a burst, as the higher rank does."""
    with suppress(OSError):
        while _receive(connection, 1) == b"?":
            connection.sendall(b"!")
        connection.sendall(struct.pack("!d", _receive_burst(connection)))


def _send_and_receive(
    following: socket.socket, previous: socket.socket
) -> float | None:
    """Send a burst to the next rank, and return the rate of that from the previous."""
    rates: list[float] = []

    def receive() -> None:
        with suppress(OSError):
            rates.append(_receive_burst(previous))

    receiver = threading.Thread(target=receive)
    receiver.start()
    _send_burst(following)
    receiver.join()
    return rates[0] if rates else None


def _round_trip(connection: socket.socket) -> float:
    """Seconds of the quickest of some short messages there and back."""
    quickest, until = float("inf"), time.monotonic() + ROUND_TRIP_SECONDS
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        connection.sendall(b"?")
        _receive(connection, 1)
        quickest = min(quickest, time.perf_counter() - begin)
        if time.monotonic() > until:
            break
    connection.sendall(b".")
    return quickest


def _send_burst(connection: socket.socket) -> None:
    block, until = b"+" + bytes(BLOCK_BYTES), time.monotonic() + BURST_SECONDS
    while time.monotonic() < until:
        connection.sendall(block)
    connection.sendall(b".")


def _receive_burst(connection: socket.socket) -> float:
    """Bytes a second of a burst's second half: TCP's windows open during the first."""
    block = memoryview(bytearray(BLOCK_BYTES))
    times = []
    while _receive(connection, 1) == b"+":
        filled = 0
        while filled < BLOCK_BYTES:
            count = connection.recv_into(block[filled:])
            if count == 0:
                raise ConnectionError("closed")
            filled += count
        times.append(time.perf_counter())
    half = len(times) // 2 - 1 if len(times) > 1 else 0
    blocks = len(times) - 1 - half
    return BLOCK_BYTES * blocks / max(1e-9, times[-1] - times[half])


def _receive(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise ConnectionError("closed")
    return data


def _pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)

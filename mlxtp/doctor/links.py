"""Whether ranks reach each other where their data go, how soon and how fast."""

import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

from mlxtp.comm.line import Line

REACH_SECONDS = 2.0
STALL_SECONDS = 3.0

ROUND_TRIPS = 20
ROUND_TRIP_SECONDS = 0.2
LAPS = 3
BURST_SECONDS = 0.15
BLOCK_BYTES = 256 * 1024
RANK = struct.Struct("!I")


@dataclass(frozen=True)
class Link:
    """Between two ranks: one way, and the rate of long messages.

    The latency is half of the quickest round trip. The rate is None where short
    messages pass and long ones do not.
    """

    latency_seconds: float
    bytes_per_second: float | None

    def better(self, other: "Link") -> "Link":
        """The better figures of two measurements: noise makes them worse alone."""
        rates = [self.bytes_per_second or 0.0, other.bytes_per_second or 0.0]
        latency = min(self.latency_seconds, other.latency_seconds)
        return Link(latency, max(rates) or None)


@dataclass(frozen=True)
class Ring:
    """The ranks in order, each with the next: a message once around, and the rate of
    the slowest when all send to the next at once."""

    seconds: float
    bytes_per_second: float


class Sockets:
    """A connection to each other rank, from address to address; what there is of it."""

    def __init__(self, line: Line, address: str) -> None:
        self._line = line
        self.rank, self.size = line.rank, line.size
        self._to: dict[int, socket.socket] = {}
        with socket.create_server((address, 0)) as server:
            servers = line.gather(server.getsockname())
            calls = [
                threading.Thread(target=self._call, args=(rank, address, servers[rank]))
                for rank in range(self.rank)
            ]
            for call in calls:
                call.start()
            self._answer(server)
            for call in calls:
                call.join()
        there = line.gather(set(self._to))
        self.reached = {
            (a, b)
            for a, b in combinations(range(self.size), 2)
            if b in there[a] and a in there[b]
        }

    def _call(self, rank: int, address: str, server: tuple[str, int]) -> None:
        with suppress(OSError):
            line = socket.create_connection(server, REACH_SECONDS, (address, 0))
            line.sendall(RANK.pack(self.rank))
            self._take(rank, line)

    def _answer(self, server: socket.socket) -> None:
        until = time.monotonic() + REACH_SECONDS + 0.5
        callers = self.size - 1 - self.rank
        while callers and (rest := until - time.monotonic()) > 0:
            server.settimeout(rest)
            with suppress(OSError):
                line, _ = server.accept()
                line.settimeout(REACH_SECONDS)
                [rank] = RANK.unpack(_take(line, RANK.size))
                self._take(rank, line)
                callers -= 1

    def _take(self, rank: int, line: socket.socket) -> None:
        line.settimeout(STALL_SECONDS)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._to[rank] = line

    def measure(self, pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Link]:
        """Those of `pairs` that are reached, one after the other."""
        found = {}
        for a, b in sorted(self.reached.intersection(pairs)):
            mine = None
            if self.rank == a:
                mine = self._first(self._to[b])
            elif self.rank == b:
                self._second(self._to[a])
            link = self._line.gather(mine)[a]
            if link is not None:
                found[a, b] = link
            if link is None or link.bytes_per_second is None:
                self.reached.discard((a, b))  # whatever is under way there stays
        return found

    def _first(self, line: socket.socket) -> Link | None:
        """What the lower rank does of a pair."""
        try:
            seconds = _round_trip(line)
        except OSError:
            return None
        try:
            _send_burst(line)
            return Link(seconds / 2, struct.unpack("!d", _take(line, 8))[0])
        except OSError:
            return Link(seconds / 2, None)

    def _second(self, line: socket.socket) -> None:
        """What the higher rank does: answers, and tells the rate it has received at."""
        with suppress(OSError):
            while _take(line, 1) == b"?":
                line.sendall(b"!")
            line.sendall(struct.pack("!d", _receive_burst(line)))

    def ring(self) -> Ring | None:
        """Around the ring, where every rank reaches the next."""
        pairs = {_pair(rank, (rank + 1) % self.size) for rank in range(self.size)}
        if self.size < 2 or not pairs <= self.reached:
            return None
        following = self._to[(self.rank + 1) % self.size]
        previous = self._to[(self.rank - 1) % self.size]
        lap: float | None = None
        rate: float | None = None
        with suppress(OSError):
            lap = self._laps(following, previous)
        if None in self._line.gather(lap):
            return None
        with suppress(OSError):
            rate = self._all_at_once(following, previous)
        laps, rates = zip(*self._line.gather((lap, rate)), strict=True)
        return None if None in rates else Ring(laps[0], min(rates))

    def _laps(self, following: socket.socket, previous: socket.socket) -> float:
        quickest = float("inf")
        for _ in range(LAPS):
            begin = time.perf_counter()
            if self.rank == 0:
                following.sendall(b"?")
                _take(previous, 1)
            else:
                _take(previous, 1)
                following.sendall(b"?")
            quickest = min(quickest, time.perf_counter() - begin)
        return quickest

    def _all_at_once(
        self, following: socket.socket, previous: socket.socket
    ) -> float | None:
        done: list[float] = []

        def receive() -> None:
            with suppress(OSError):
                done.append(_receive_burst(previous))

        receiver = threading.Thread(target=receive)
        receiver.start()
        _send_burst(following)
        receiver.join()
        return done[0] if done else None

    def close(self) -> None:
        for line in self._to.values():
            line.close()


def _round_trip(line: socket.socket) -> float:
    """Seconds of the quickest of some short messages there and back."""
    quickest, until = float("inf"), time.monotonic() + ROUND_TRIP_SECONDS
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        line.sendall(b"?")
        _take(line, 1)
        quickest = min(quickest, time.perf_counter() - begin)
        if time.monotonic() > until:
            break
    line.sendall(b".")
    return quickest


def _send_burst(line: socket.socket) -> None:
    block, until = b"+" + bytes(BLOCK_BYTES), time.monotonic() + BURST_SECONDS
    while time.monotonic() < until:
        line.sendall(block)
    line.sendall(b".")


def _receive_burst(line: socket.socket) -> float:
    """Bytes a second of the second half of a burst: windows open as bytes pass."""
    block = memoryview(bytearray(BLOCK_BYTES))
    times = []
    while _take(line, 1) == b"+":
        here = 0
        while here < BLOCK_BYTES:
            count = line.recv_into(block[here:])
            if count == 0:
                raise ConnectionError("closed")
            here += count
        times.append(time.perf_counter())
    half = len(times) // 2 - 1 if len(times) > 1 else 0
    blocks = len(times) - 1 - half
    return BLOCK_BYTES * blocks / max(1e-9, times[-1] - times[half])


def _take(line: socket.socket, count: int) -> bytes:
    found = line.recv(count, socket.MSG_WAITALL)
    if len(found) < count:
        raise ConnectionError("closed")
    return found


def _pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)

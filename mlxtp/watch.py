"""Whether the other ranks are still there, and the end of the job if not.

Every rank tells every other once a second, in a datagram from a thread of its
own, that it lives and what it does. So a rank that died, was stopped or is cut off
is missed whatever the transport, while it loads as well as while it waits, and
however long others compute. Where there is a ring of cables the datagrams go
through it, like the data.
"""

import atexit
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mlxtp.transports import Transport
from mlxtp.transports.network import own_address

BEAT_SECONDS = 1.0

# How long a rank that misses another leaves it to the lowest rank to say so.
LEAVE_SECONDS = 1.5

# How long a rank that mpirun ends looks for the one that died. mpirun asks, and
# kills a second later.
LAST_LOOK_SECONDS = 0.4


@dataclass
class Peer:
    """What is known of another rank."""

    rank: int
    host: str
    socket: socket.socket
    heard: float = 0.0  # when last, of the monotonic clock; 0 before the first time
    gone: bool = False  # its host says that nobody listens there any more
    left: bool = False  # it said good-bye
    number: int = 0
    waits: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Watch:
    """Ends the job when a rank is missing, with a message that says which.

    `timeout_seconds` is how long a rank may be silent, and how long this rank may
    wait in one collective.
    """

    def __init__(self, transport: Transport, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._beat_seconds = min(BEAT_SECONDS, timeout_seconds / 5)
        self._rank = transport.rank
        self._host = socket.gethostname()
        self._number = 0  # of collectives begun
        self._doing = ("", "")
        self._since: float | None = None  # when the wait began
        self._limited = True
        self._ending = False
        self._parent = os.getppid()
        self._peers: list[Peer] = []
        self._listen = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._listen.bind(("", 0))
        self._listen.setblocking(False)
        self._connect(transport)
        self._terminated, wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        self._notice_sigterm(wake)
        atexit.register(self.leave)

    def _connect(self, transport: Transport) -> None:
        hosts = transport.allgather_objects(self._host)
        self._key = transport.bcast_object(secrets.token_hex(8), 0)
        mine = (own_address(hosts), self._listen.getsockname()[1])
        for rank, address in enumerate(transport.allgather_objects(mine)):
            if rank != self._rank:
                line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                line.setblocking(False)
                with suppress(OSError):
                    line.connect(address)
                self._peers.append(Peer(rank, hosts[rank], line))

    def _notice_sigterm(self, wake: socket.socket) -> None:
        """Let the thread answer for a main thread that is deep in MLX or MPI."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            number = bytes([signal.SIGTERM])
            signal.signal(signal.SIGTERM, lambda *_: wake.send(number) and None)

    @contextmanager
    def collective(self, what: str, at: str = "") -> Iterator[None]:
        """The main thread is in a collective: `what`, and of which layer."""
        self._number += 1
        self._doing = (what, at)
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let waits take as long as they take, while ranks load, say."""
        before, self._limited = self._limited, False
        try:
            yield
        finally:
            self._limited = before

    def leave(self) -> None:
        """Tell the others that this rank ends, so that nobody misses it."""
        if not self._ending:
            self._ending = True
            for _ in range(3):  # a datagram may be lost
                self._tell(left=True)

    def end_job(self, text: str) -> None:
        """Print `text` and end this process; mpirun then ends all others."""
        self.leave()
        with suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"{text}\n".encode())
        os._exit(1)

    def _run(self) -> None:
        next_beat, last_turn = 0.0, time.monotonic()
        while not self._ending:
            now = time.monotonic()
            if now - last_turn > 2 * BEAT_SECONDS:
                self._forget_silence(now)  # this rank itself was stopped
            last_turn = now
            if now >= next_beat:
                next_beat = now + self._beat_seconds
                self._tell()
                self._check(now)
            sources = [self._listen, self._terminated]
            readable, _, _ = select.select(sources, [], [], max(0, next_beat - now))
            if self._listen in readable:
                self._hear()
            if self._terminated in readable:
                signals = self._terminated.recv(16)
                if signal.SIGTERM in signals:
                    self._last_look()

    def _forget_silence(self, now: float) -> None:
        for peer in self._peers:
            peer.heard = peer.heard and now

    def _tell(self, to: Peer | None = None, **more: Any) -> None:
        """Send what this rank does to one peer or all."""
        state = {
            "key": self._key,
            "rank": self._rank,
            "number": self._number,
            "waits": self._since is not None,
            **more,
        }
        for peer in [to] if to else self._peers:
            try:
                peer.socket.send(json.dumps(state).encode())
            except ConnectionRefusedError:
                peer.gone = True
            except OSError:
                pass  # the network is down: the silence will be noticed

    def _hear(self) -> None:
        """Take in what peers have sent."""
        while True:
            try:
                state = json.loads(self._listen.recv(4096))
            except BlockingIOError:
                return
            except (ValueError, OSError):
                continue
            if not isinstance(state, dict) or state.get("key") != self._key:
                continue  # not of this job
            peer = next(p for p in self._peers if p.rank == state["rank"])
            peer.heard, peer.gone = time.monotonic(), False
            peer.number, peer.waits = state["number"], state["waits"]
            peer.left = peer.left or state.get("left", False)
            if state.get("asks"):
                self._tell(peer)
            if "verdict" in state and not self._ending:
                self.end_job(state["verdict"])

    def _check(self, now: float) -> None:
        """End the job if a rank is missing or this rank has waited too long."""
        if os.getppid() != self._parent:
            os._exit(1)  # mpirun is gone, and nobody else would end this rank
        silent = [
            peer
            for peer in self._peers
            if peer.heard and not peer.left and now - peer.heard > self.timeout_seconds
        ]
        since = self._since
        overdue = since is not None and now - since > self.timeout_seconds
        if silent or (overdue and self._limited):
            self._report(self._verdict(silent))

    def _verdict(self, silent: list[Peer]) -> str:
        """What is wrong, in words."""
        limit = f"{self.timeout_seconds:g} s"
        if silent:
            what = f"{_list(silent)} did not answer for {limit}"
        elif left := [peer for peer in self._peers if peer.left]:
            what = f"{_list(left)} left while others waited"
        elif late := [peer for peer in self._peers if peer.number < self._number]:
            what = f"{_list(late)} did not come within {limit}"
        else:
            what = f"messages did not arrive within {limit}, though all ranks answer"
        return self._sentence(what)

    def _sentence(self, what: str) -> str:
        collective, at = self._doing
        where = f"{collective} {self._number}" + (f" of {at}" if at else "")
        state = "is in" if self._since is not None else "has last done"
        me = f"rank {self._rank} on {self._host}"
        doing = f"; {me} {state} {where}" if collective else ""
        return f"mlxtp: {what}{doing}: all ranks end"

    def _report(self, verdict: str) -> None:
        """Let the lowest rank that answers print the verdict, and end."""
        now = time.monotonic()
        fresh = now - 3 * self._beat_seconds
        lower = [p for p in self._peers if p.rank < self._rank and p.heard > fresh]
        deadline = now + LEAVE_SECONDS
        while lower and time.monotonic() < deadline:
            self._tell(lower[0], verdict=verdict)
            select.select([self._listen], [], [], 0.2)
            self._hear()
        self.end_job(verdict)

    def _last_look(self) -> None:
        """mpirun ends this rank: say whether another has died, and go."""
        asked = time.monotonic()
        silent = self._peers
        while silent and time.monotonic() - asked < LAST_LOOK_SECONDS:
            for peer in silent:
                self._tell(peer, asks=True)
            select.select([self._listen], [], [], 0.05)
            self._hear()
            silent = [p for p in self._peers if p.heard < asked and not p.gone]
        dead = [p for p in self._peers if p.heard < asked and not p.left]
        alive = [p.rank for p in self._peers if p.heard >= asked]
        if dead and self._rank < min(alive, default=self._rank + 1):
            self.end_job(self._sentence(f"{_list(dead)} died"))
        os._exit(128 + signal.SIGTERM)


def _list(peers: list[Peer]) -> str:
    return ", ".join(map(str, peers))

"""Whether the other ranks are still there, and the end of the job if not.

Every rank tells every other once a second, in a datagram from a thread of its
own, that it lives and what it does. So a rank that died, was stopped or is cut off
is missed whatever the transport, while it loads as well as while it waits, and
however long others compute. Where there is a ring of cables the datagrams go
through it, like the data.
"""

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

from mlxtp.cluster.addresses import own_address
from mlxtp.comm.transports import Transport

BEAT_SECONDS = 1.0

# How long a rank that misses another leaves it to the lowest rank to say so.
LEAVE_SECONDS = 1.5

# How long a rank that mpirun ends looks for the one that died, also once it has found
# one and waits for others to answer, and then stays for those who look. mpirun asks,
# and kills a second later, or a quarter of a second where one has gone.
LAST_LOOK_SECONDS = 0.4
FOUND_SECONDS = 0.1
STAY_SECONDS = 0.4


@dataclass
class Peer:
    """What is known of another rank."""

    rank: int
    host: str
    socket: socket.socket
    heard: float = 0.0  # when last, of the monotonic clock; 0 before the first time
    gone: bool = False  # its host says that nobody listens there any more
    left: bool = False  # it said good-bye
    number: int = 0  # of collectives that it has begun

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
        self._doing = ""
        self._since: float | None = None  # when the wait began
        self._limited = True
        self._ending = False
        self._speaking = threading.RLock()  # of the thread that ends this process
        self._finish_by: float | None = None  # when the end has to be over
        self._parent = os.getppid()
        self._peers: list[Peer] = []
        self._listen = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._listen.bind(("", 0))
        self._listen.setblocking(False)
        self._key = ""  # of this job
        self._terminated, wake = socket.socketpair()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        self._notice_sigterm(wake)
        with self.collective("the first exchange"):
            self._connect(transport)

    def _connect(self, transport: Transport) -> None:
        hosts = transport.allgather_object(self._host)
        key = transport.bcast_object(secrets.token_hex(8), 0)
        mine = (own_address(hosts), self._listen.getsockname()[1])
        peers = []
        for rank, address in enumerate(transport.allgather_object(mine)):
            if rank != self._rank:
                line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                line.setblocking(False)
                with suppress(OSError):
                    line.connect(address)
                peers.append(Peer(rank, hosts[rank], line))
        self._peers, self._key = peers, key

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
        self._doing = f"{what} {self._number}" + (f" of {at}" if at else "")
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def put_in_graph(self, what: str, at: str) -> None:
        """The main thread has a collective ahead of it, which MLX will wait for."""
        self._doing = f"the graph with {what} of {at}"

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let waits take as long as they take, while ranks load, say."""
        before, self._limited = self._limited, False
        try:
            yield
        finally:
            self._limited = before

    @contextmanager
    def finish(self) -> Iterator[None]:
        """The last thing that this rank does with the others."""
        self.leave()
        self._finish_by = time.monotonic() + self.timeout_seconds
        yield
        self._finish_by = None

    def leave(self) -> None:
        """Tell the others that this rank ends, so that nobody misses it."""
        if not self._ending:
            self._ending = True
            for _ in range(3):  # a datagram may be lost
                self._tell(left=True)

    def end_job(self, text: str) -> None:
        """Print `text` and end this process; mpirun then ends all others."""
        with self._speaking:
            self.leave()
            # Whoever reads the output may have stopped: no flush is waited for.
            flush = threading.Thread(target=sys.stdout.flush, daemon=True)
            flush.start()
            flush.join(0.5)
            os.write(2, f"{text}\n".encode())
            os._exit(1)

    def _run(self) -> None:
        next_beat, last_turn = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - last_turn > 2 * BEAT_SECONDS:
                self._forget_silence(now)  # this rank itself was stopped
            last_turn = now
            if now >= next_beat:
                next_beat = now + self._beat_seconds
                if self._ending:
                    self._check_finish(now)
                else:
                    self._tell()
                    self._check(now)
            sources = [self._listen, self._terminated]
            readable, _, _ = select.select(sources, [], [], max(0, next_beat - now))
            if self._listen in readable:
                self._hear()
            if self._terminated in readable:
                signals = self._terminated.recv(16)
                if signal.SIGTERM in signals:
                    with self._speaking:
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
            peer.number = state["number"]
            peer.left = peer.left or state.get("left", False)
            if state.get("asks"):
                self._tell(peer)
            if "what" in state and not self._ending:
                self._judge(peer, state)

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
            if len(self._unheard()) > max(1, len(self._peers) / 2):
                # It is this rank that is cut off: those who hear each other say so.
                time.sleep(2 * LEAVE_SECONDS)
            self._report(silent)

    def _check_finish(self, now: float) -> None:
        """End this process if the others do not let it."""
        if self._finish_by is not None and now > self._finish_by:
            me = f"rank {self._rank} on {self._host}"
            limit = f"{self.timeout_seconds:g} s"
            self.end_job(f"mlxtp: {me} waited {limit} for the others to end")

    def _report(self, silent: list[Peer]) -> None:
        """Let the lowest rank that answers say what is wrong, and end."""
        what, where = self._trouble(silent), self._where()
        missed = [peer.rank for peer in silent]
        lower = [p for p in self._peers if p.rank < self._rank and self._hears(p)]
        deadline = time.monotonic() + LEAVE_SECONDS
        while lower and time.monotonic() < deadline:
            self._tell(lower[0], what=what, where=where, missed=missed)
            self._listen_for(0.2)
        self.end_job(f"mlxtp: {what}{where}: all ranks end")

    def _judge(self, reporter: Peer, state: dict[str, Any]) -> None:
        """End the job with what a higher rank reports and this one knows better."""
        what = state["what"]
        missed = [peer for peer in self._peers if peer.rank in state["missed"]]
        if missed and (unheard := self._unheard()):
            what = self._trouble(unheard)
        elif missed:
            what = f"{reporter} and {_list(missed)} do not hear each other (a cable?)"
        self.end_job(f"mlxtp: {what}{state['where']}: all ranks end")

    def _hears(self, peer: Peer) -> bool:
        return peer.heard > time.monotonic() - 3 * self._beat_seconds

    def _unheard(self) -> list[Peer]:
        """Who was there once and has not been heard lately."""
        known = [peer for peer in self._peers if peer.heard and not peer.left]
        return [peer for peer in known if not self._hears(peer)]

    def _trouble(self, silent: list[Peer]) -> str:
        """What is wrong, in words."""
        limit = f"{self.timeout_seconds:g} s"
        if silent:
            return f"{_list(silent)} did not answer for {limit} (stopped or cut off)"
        if not self._peers:
            return f"the ranks did not all find each other within {limit}"
        if left := [peer for peer in self._peers if peer.left]:
            return f"{_list(left)} left while others waited"
        if late := [peer for peer in self._peers if peer.number < self._number]:
            return f"{_list(late)} did not come within {limit}"
        return f"messages did not arrive within {limit}, though all ranks answer"

    def _where(self) -> str:
        """What this rank was doing meanwhile, in words."""
        state = "is in" if self._since is not None else "was last in"
        return f"; rank {self._rank} on {self._host} {state} {self._doing}"

    def _last_look(self) -> None:
        """mpirun ends this rank: say whether another has died, and go."""
        asked = time.monotonic()
        silent, seconds = self._peers, LAST_LOOK_SECONDS
        while silent and time.monotonic() - asked < seconds:
            for peer in silent:
                self._tell(peer, asks=True)
            self._listen_for(0.05)
            silent = [p for p in self._peers if p.heard < asked and not p.gone]
            if any(peer.gone for peer in self._peers):
                seconds = FOUND_SECONDS
        unheard = [p for p in self._peers if p.heard < asked and not p.left]
        # A busy rank may be too slow to answer, but its host does not say it is gone.
        dead = [p for p in unheard if p.gone] or unheard
        alive = [p.rank for p in self._peers if p.heard >= asked]
        if dead and self._rank < min(alive, default=self._rank + 1):
            self.end_job(f"mlxtp: {_list(dead)} died{self._where()}: all ranks end")
        leave_at = time.monotonic() + STAY_SECONDS
        while (rest := leave_at - time.monotonic()) > 0:
            self._listen_for(rest)
        os._exit(128 + signal.SIGTERM)

    def _listen_for(self, seconds: float) -> None:
        select.select([self._listen], [], [], seconds)
        self._hear()


def _list(peers: list[Peer]) -> str:
    return ", ".join(map(str, peers))

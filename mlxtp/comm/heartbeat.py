"""Every rank tells every other once a second that it lives and what it does.

It does so in a datagram, from a thread of its own. So the others notice
a rank that died, was stopped or is cut off: over every transport, while it loads or
waits, and however long they compute. Where there is a ring of cables the datagrams
go through it, like the data.
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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NoReturn

from mlxtp.cluster.addresses import own_address
from mlxtp.cluster.verdict import Verdict
from mlxtp.comm import ending, launcher
from mlxtp.comm import verdict as verdicts
from mlxtp.comm.progress import Blocks, Progress
from mlxtp.comm.transports import Transport
from mlxtp.comm.verdict import BEAT_SECONDS, Limits, Peer, ThisRank

# How long a rank that misses another waits for the lowest rank to report that.
LEAVE_SECONDS = 1.5

# How long the main thread has to raise RankLostError before the process ends, and how
# long a rank that ends leaves it to the one that found the loss to say so; higher ranks
# leave it to lower ones.
RAISE_SECONDS = 2.0
SAY_SECONDS = 0.5
SAY_LATER_SECONDS = 0.1

LONGEST_DATAGRAM = 65536

# How long ranks that have found each other wait at most until all are heard, but no
# more than this part of the limit of silence; how often they ask those that are not,
# and how often they look.
HELLO_SECONDS = 2.0
HELLO_PART = 1 / 3
ASK_SECONDS = 0.2

# How long after a collective in MLX's graph has failed the job ends at the latest.
FAILED_SECONDS = 2.0

# How often a rank that has raised, or greets, looks what others have said, and how much
# of an exception a verdict says.
LOOK_SECONDS = 0.005
LOSS_LOOK_SECONDS = 0.1
LONGEST_ERROR = 500


class Heartbeat:
    """Tell the peers what this rank does, hear them, and end the job if one is lost.

    `limits` are how long a rank may be silent, and how long this rank may wait in one
    collective. Where `raises`, a rank that is lost lets the main thread raise
    RankLostError, and the process ends only where it does not come to that. Starts a
    thread and a handler of SIGTERM.

    Communicates: three allgathers and a broadcast of objects, over `transport`.
    """

    def __init__(
        self,
        transport: Transport,
        progress: Progress,
        limits: Limits,
        *,
        raises: bool = False,
    ) -> None:
        self.peers: list[Peer] = []
        self._hearing = threading.Lock()  # while a peer is half changed
        self._limits = limits
        self._progress = progress
        self._raises = raises
        self._raise_by = 0.0  # when the main thread must have raised
        self._is_finder = False  # this rank has found that one is lost
        self._is_said = False  # another rank has printed that
        self._rank = transport.rank
        self._host = socket.gethostname()
        self._leaving = False
        self._speaking = threading.RLock()  # of the thread that ends this process
        self._finish_by: float | None = None  # when the end has to be over
        self._parent = os.getppid()
        self._sockets: dict[int, socket.socket] = {}  # by rank
        self._listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._listening.bind(("", 0))
        self._listening.setblocking(False)
        self._key = ""  # of this job
        self._is_connected = False  # the first exchange is over
        self._terminated, self._wake = ending.wake_on_sigterm()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        with progress.collective("the first exchange"):
            self._connect(transport)

    def _connect(self, transport: Transport) -> None:
        hosts = transport.allgather_object(self._host)
        key = transport.bcast_object(secrets.token_hex(8), 0)
        mine = (own_address(hosts), self._listening.getsockname()[1])
        peers = []
        for rank, address in enumerate(transport.allgather_object(mine)):
            if rank != self._rank:
                sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sending.setblocking(False)
                with suppress(OSError):
                    sending.connect(address)
                self._sockets[rank] = sending
                peers.append(Peer(rank, hosts[rank]))
        self.peers, self._key = peers, key
        # A rank that is lost here is missed in the exchange; later, in its beats.
        self._greet()
        unheard = [peer.rank for peer in peers if not peer.heard]
        deaf = {
            rank: those
            for rank, those in enumerate(transport.allgather_object(unheard))
            if those
        }
        self._is_connected = True
        if deaf and self._rank == 0:
            rank, [other, *_] = next(iter(deaf.items()))
            print(
                f"mlxtp: rank {rank} on {hosts[rank]} does not hear the heartbeat of "
                f"rank {other} on {hosts[other]} (a firewall for UDP?), and will not "
                f"miss it; pairs such as this: {sum(map(len, deaf.values()))}",
                file=sys.stderr,
            )

    def _greet(self) -> None:
        """Ask all peers to answer, until they have or the time for it is over."""
        until = min(HELLO_SECONDS, HELLO_PART * self._limits.silence_seconds)
        until += time.monotonic()
        ask_at = 0.0
        while unheard := [peer for peer in self.peers if not peer.heard]:
            now = time.monotonic()
            if now > until:
                return
            if now >= ask_at:
                ask_at = now + ASK_SECONDS
                for peer in unheard:
                    self.ask(peer)
            self.listen(LOOK_SECONDS)  # the thread of the heartbeat may hear as well

    @contextmanager
    def finish(self) -> Iterator[None]:
        """Limit the time of the last thing that this rank does with the others."""
        self.leave()
        # If the others wait for this rank, they say so first.
        patience = self._limits.timeout_seconds + 2 * LEAVE_SECONDS
        self._finish_by = time.monotonic() + patience
        yield
        self._finish_by = None

    def leave(self) -> None:
        """Tell the others that this rank ends, so that nobody misses it."""
        if not self._leaving:
            self._leaving = True
            for _ in range(3):  # a datagram may be lost
                self._tell(left=True)

    def fail(self, trace: str) -> NoReturn:
        """End the job because of an exception, whose `trace` is printed."""
        self.end_job(verdicts.failed(self._limits, self._this_rank()), trace)

    def wait_until_all_raise(self, error: Exception) -> None:
        """Wait until all ranks have left a block with an exception, as this one has.

        Ends the job if a rank goes on without, or does not come within the limit.
        """
        self._tell()
        since = time.monotonic()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR]
        while True:
            self._progress.raise_if_lost()
            # Both questions are of one moment: the thread goes on hearing meanwhile.
            peers, this = self._copied_peers(), self._this_rank()
            if verdicts.have_all_raised(peers, this):
                return
            verdict = verdicts.judge_raised(
                peers, time.monotonic(), since, self._limits, this, text
            )
            if verdict is not None:
                time.sleep(launcher.report_delay_seconds())
                self.end_job(verdict, "".join(traceback.format_exception(error)))
            time.sleep(LOOK_SECONDS)

    def end_job(self, verdict: Verdict, trace: str = "") -> NoReturn:
        """Say good-bye to the peers and end this process; mpirun then ends all."""
        with self._speaking:
            self.leave()
            ending.end_process(verdict, trace)

    def is_lost(self) -> bool:
        """Whether the program raises RankLostError because a rank is lost."""
        return self._progress.lost is not None

    def lose(self, verdict: Verdict, seconds: float = RAISE_SECONDS) -> None:
        """End the job with `verdict`, or let all ranks raise it.

        The main thread has so many seconds to raise it.
        """
        if not self._raises or self._leaving:
            self.end_job(verdict)
        for _ in range(3):  # a datagram may be lost
            self._tell(lost=verdict.to_json())
        self._is_finder = True
        self._start_raising(verdict, seconds)

    def _start_raising(self, verdict: Verdict, seconds: float) -> None:
        self._raise_by = time.monotonic() + seconds
        self._progress.lose(verdict)

    def end_lost(self, verdict: Verdict) -> NoReturn:
        """End this process because of a lost rank; one of the ranks says so."""
        delay = 0.0 if self._is_finder else SAY_SECONDS + SAY_LATER_SECONDS * self._rank
        say_at = time.monotonic() + delay
        while not self._is_said and (rest := say_at - time.monotonic()) > 0:
            self.listen(rest)
        if self._is_said:
            ending.end_silently()
        for _ in range(3):
            self._tell(said=True)
        self.end_job(verdict)

    def ask(self, peer: Peer) -> None:
        """Ask a peer to answer at once."""
        self._tell(peer, asks=True)

    def listen(self, seconds: float) -> None:
        """Take in what peers send, for so long at most."""
        select.select([self._listening], [], [], seconds)
        self._hear()

    def judge_termination(self, asked: float) -> Verdict | None:
        """Return which ranks have died, if it is this rank that says so."""
        return verdicts.judge_termination(
            self.peers, asked, self._limits, self._this_rank()
        )

    def _copied_peers(self) -> list[Peer]:
        """Copy what is known of the peers, none of them while it is changed."""
        with self._hearing:
            return [replace(peer) for peer in self.peers]

    def _this_rank(self) -> ThisRank:
        progress = self._progress
        return ThisRank(
            self._rank,
            self._host,
            progress.number,
            progress.last_call(),
            progress.waits(),
            progress.limited_since,
            progress.blocks,
            self._is_connected,
        )

    def _run(self) -> None:
        next_beat, last_turn = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - last_turn > 2 * BEAT_SECONDS:
                self._forget_silence(now)  # this rank itself was stopped
            last_turn = now
            if now >= next_beat:
                next_beat = now + self._limits.beat_seconds
                if self._progress.lost is not None:
                    next_beat = now + LOSS_LOOK_SECONDS
                    self._check_raised(now, self._progress.lost)
                elif self._leaving:
                    self._check_finish(now)
                else:
                    self._tell()
                    self._check(now)
            sources = [self._listening, self._terminated]
            readable, _, _ = select.select(sources, [], [], max(0, next_beat - now))
            if self._listening in readable:
                self._hear()
            if self._terminated in readable:
                signals = self._terminated.recv(16)
                if signal.SIGTERM in signals:
                    self._end_by_mpirun()
                    next_beat = 0.0  # there is little time

    def _end_by_mpirun(self) -> None:
        """Look which rank has died, and end, because mpirun ends this process.

        A program that has been told of the loss has the time that mpirun gives it.
        """
        if self._progress.has_raised:
            return
        if self._progress.lost is not None:
            ending.end_by_sigterm()  # another rank has said it, or handles it
        with self._speaking:
            ending.last_look(self)

    def _forget_silence(self, now: float) -> None:
        for peer in self.peers:
            peer.heard = peer.heard and now

    def _tell(self, to: Peer | None = None, **more: Any) -> None:
        """Send what this rank does to one peer or all."""
        state = {
            "key": self._key,
            "rank": self._rank,
            # Read first: a rank counts a block before the collectives behind it, so
            # a number that counts those never goes out with blocks that lack it.
            "number": self._progress.number,
            "begun": self._progress.graph().begun,
            "blocks": self._progress.blocks,
            **more,
        }
        for peer in [to] if to else self.peers:
            try:
                self._sockets[peer.rank].send(json.dumps(state).encode())
            except ConnectionRefusedError:
                peer.gone = True
            except OSError:
                pass  # the network is down: the silence will be noticed

    def _hear(self) -> None:
        """Take in what peers have sent."""
        while True:
            try:
                state = json.loads(self._listening.recv(LONGEST_DATAGRAM))
            except BlockingIOError:
                return
            except (ValueError, OSError):
                continue
            if not isinstance(state, dict) or state.get("key") != self._key:
                continue  # not of this job
            peer = next(p for p in self.peers if p.rank == state["rank"])
            with self._hearing:
                peer.heard, peer.gone = time.monotonic(), False
                peer.number = max(peer.number, state["number"])
                peer.begun = max(peer.begun, state["begun"])
                # A datagram may be overtaken by a later one.
                peer.blocks = max(peer.blocks, Blocks(*state["blocks"]))
                peer.left = peer.left or state.get("left", False)
            if state.get("asks"):
                self._tell(peer)
            self._is_said = self._is_said or state.get("said", False)
            if self._progress.lost is not None:
                continue
            if "lost" in state and not self._leaving:
                self._start_raising(Verdict.from_json(state["lost"]), RAISE_SECONDS)
            elif "verdict" in state and not self._leaving:
                report, now = Verdict.from_json(state["verdict"]), time.monotonic()
                this = self._this_rank()
                self.lose(
                    verdicts.reconsider(report, self.peers, now, self._limits, this)
                )

    def _check(self, now: float) -> None:
        """End the job if a rank is lost or this rank has waited too long."""
        if os.getppid() != self._parent:
            os._exit(1)  # mpirun is gone, and nobody else would end this rank
        if failure := self._progress.graph().failure:
            # The main thread ends the job itself if nobody catches what MLX raises.
            time.sleep(FAILED_SECONDS)
            self.fail(f"{failure}\n")
        verdict = verdicts.judge(self.peers, now, self._limits, self._this_rank())
        if verdict is not None and verdicts.is_cut_off(self.peers, now, self._limits):
            # Those who hear each other say so first. Meanwhile all others are missed,
            # or it was cut off for a moment.
            time.sleep(2 * LEAVE_SECONDS)
            self._hear()
            now, this = time.monotonic(), self._this_rank()
            verdict = verdicts.judge(self.peers, now, self._limits, this)
        if verdict is not None:
            self._report(verdict)

    def _check_raised(self, now: float, verdict: Verdict) -> None:
        """End this process if its main thread does not come to raise the loss."""
        if self._progress.has_raised:
            return
        if os.getppid() != self._parent:
            os._exit(1)
        if now > self._raise_by:
            self.end_lost(verdict)

    def _check_finish(self, now: float) -> None:
        """End this process if the others do not let it."""
        if self._finish_by is not None and now > self._finish_by:
            self.end_job(verdicts.not_ended(self._limits, self._this_rank()))

    def _report(self, verdict: Verdict) -> None:
        """Let the lowest rank that answers say what is wrong, and end or raise."""
        now = time.monotonic()
        lower = [
            peer
            for peer in self.peers
            if peer.rank < self._rank and verdicts.is_heard(peer, now, self._limits)
        ]
        deadline = now + LEAVE_SECONDS
        while lower and time.monotonic() < deadline and not self.is_lost():
            self._tell(lower[0], verdict=verdict.to_json())
            self.listen(0.2)
        if not self.is_lost():
            self.lose(verdict)

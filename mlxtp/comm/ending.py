"""The end of this process: what it prints, and its last look when mpirun ends it."""

import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn, Protocol

from mlxtp.cluster.verdict import VERDICT_VARIABLE, Verdict
from mlxtp.comm.verdict import Peer

# Whoever reads the output may have stopped: a flush is not waited for any longer.
FLUSH_SECONDS = 0.5

# mpirun ends ranks by SIGTERM, and kills them a second later, or a quarter of a second
# after one of them has gone. Until then a rank looks for the one that died; once it
# has found one it looks on for a shorter time; then it stays, to answer those who
# look. The last is how long it waits for each answer.
LAST_LOOK_SECONDS = 0.4
FOUND_SECONDS = 0.1
STAY_SECONDS = 0.4
ANSWER_SECONDS = 0.05

# How long the main thread has then to raise RankLostError.
RAISE_SECONDS = 0.2


class Listener(Protocol):
    """What the last look needs of a heartbeat."""

    peers: list[Peer]

    def ask(self, peer: Peer) -> None:
        """Ask a peer to answer at once."""
        ...

    def listen(self, seconds: float) -> None:
        """Take in what peers send, for so long at most."""
        ...

    def judge_termination(self, asked: float) -> Verdict | None:
        """Return which ranks have died, if it is this rank that says so."""
        ...

    def is_lost(self) -> bool:
        """Whether the program raises RankLostError because a rank is lost."""
        ...

    def lose(self, verdict: Verdict, seconds: float) -> None:
        """End this process with `verdict`, or raise it within so many seconds."""
        ...


def text_of(verdict: Verdict) -> str:
    """Return what is printed: the sentence, and the data where they are asked for."""
    if os.environ.get(VERDICT_VARIABLE) == "1":
        return f"{verdict.sentence()}\n{verdict.line()}"
    return verdict.sentence()


def end_process(verdict: Verdict, trace: str = "") -> NoReturn:
    """Print `trace` and the verdict, and end this process; mpirun ends the others."""
    flush()
    os.write(2, f"{trace}{text_of(verdict)}\n".encode())
    os._exit(1)


def end_silently() -> NoReturn:
    """End this process, of which another rank has said why."""
    flush()
    os._exit(1)


def flush() -> None:
    """Write what standard output still holds, if it is taken."""
    writing = threading.Thread(target=sys.stdout.flush, daemon=True)
    writing.start()
    writing.join(FLUSH_SECONDS)


def wake_on_sigterm() -> tuple[socket.socket, socket.socket]:
    """Return a socket that becomes readable when mpirun ends this process.

    So a thread can answer for a main thread that is deep in MLX or MPI. A handler of
    SIGTERM that stands already is left alone; then nothing comes. The second socket is
    the other end, to be kept as long as the first.
    """
    awake, wake = socket.socketpair()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        number = bytes([signal.SIGTERM])
        signal.signal(signal.SIGTERM, lambda *_: wake.send(number) and None)
        os.register_at_fork(after_in_child=_forget_sigterm)
    return awake, wake


def _forget_sigterm() -> None:
    """Let SIGTERM end a forked child, which has its parent's handler and socket."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def last_look(listener: Listener) -> None:
    """Say whether another rank has died, and end: mpirun has sent SIGTERM.

    It returns where the program raises RankLostError, and has the rest of its time.
    """
    asked = time.monotonic()
    silent, seconds = listener.peers, LAST_LOOK_SECONDS
    while silent and time.monotonic() - asked < seconds:
        for peer in silent:
            listener.ask(peer)
        listener.listen(ANSWER_SECONDS)
        silent = [p for p in listener.peers if p.heard < asked and not p.gone]
        if any(peer.gone for peer in listener.peers):
            seconds = FOUND_SECONDS
    verdict = listener.judge_termination(asked)
    if verdict is not None:
        listener.lose(verdict, RAISE_SECONDS)
    leave_at = time.monotonic() + STAY_SECONDS
    while not listener.is_lost() and (rest := leave_at - time.monotonic()) > 0:
        listener.listen(rest)
    if not listener.is_lost():
        end_by_sigterm()


def end_by_sigterm() -> NoReturn:
    """End this process with the status of one that SIGTERM has ended."""
    os._exit(128 + signal.SIGTERM)

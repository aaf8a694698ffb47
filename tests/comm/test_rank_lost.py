"""A program catches RankLostError where another rank is lost, or ends as without it."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from needs import needs
from ranks import HOSTFILE, environment

from mlxtp import RankLostError
from mlxtp.cluster.verdict import RankOnHost, Verdict
from mlxtp.comm import heartbeat
from mlxtp.comm.heartbeat import Heartbeat
from mlxtp.comm.progress import Progress
from mlxtp.comm.transports import Transport
from mlxtp.comm.verdict import Limits, Peer

pytestmark = [pytest.mark.once, needs("linux")]

HOST = os.uname().nodename

# Ranks call collectives for ever; rank 1 gets a signal behind its 100th: all have
# heard each other by then.
PROGRAM = """
import os, signal, sys, time
import mlx.core as mx
import mlxtp
transport, call, number, does_catch = sys.argv[1:]
comm = mlxtp.Communicator.world(
    transport, timeout_seconds=30, silence_seconds=1.5, measure=False
)
def collective():
    if call == "allreduce":
        with comm.raising_together():
            mx.eval(comm.allreduce(mx.ones(100), at="mlp"))
    else:
        comm.announce(1) if call == "announce" else comm.barrier()
    time.sleep(0.01)  # rank 0 waits for nobody when it announces
try:
    for turn in range(100_000):
        collective()
        if comm.rank == 1 and turn == 100:
            os.kill(os.getpid(), getattr(signal, number))
except mlxtp.RankLostError as error:
    if not int(does_catch):
        raise
    lost, why = [one.rank for one in error.verdict.lost], error.verdict.why
    if comm.rank != 1:  # which goes on when mpirun ends it
        print("caught", comm.rank, why, lost, flush=True)
    for _ in range(2):
        try:
            collective()
        except mlxtp.RankLostError as again:
            assert again.verdict == error.verdict
    time.sleep(1)
    print("saved", comm.rank, flush=True)
"""

JOBS = {
    "is waited for in the graph": ("mpi", "allreduce", "SIGSTOP", 1),
    "survives": ("mpi", "allreduce", "SIGKILL", 1),
    "is not caught": ("mpi", "allreduce", "SIGSTOP", 0),
    "is waited for in Python": ("mpi-eager", "announce", "SIGSTOP", 1),
    "is waited for in MPI": ("mpi", "barrier", "SIGSTOP", 1),
    "died": ("mpi", "allreduce", "SIGKILL", 1),
}
POOL = ThreadPoolExecutor(3)
Ended = subprocess.CompletedProcess[str]


@cache
def started(what: str) -> Future[Ended]:
    """Start a job of three ranks, of which rank 1 is lost."""
    mpirun = [Path(sys.executable).parent / "mpirun", "-hostfile", HOSTFILE, "-n", 3]
    if what == "survives":
        mpirun.append("--enable-recovery")
    words = [*mpirun, sys.executable, "-c", PROGRAM, *JOBS[what]]
    return POOL.submit(
        subprocess.run,
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        timeout=90,
    )


def ended(what: str) -> Ended:
    for quick in list(JOBS)[:3]:  # at once
        started(quick)
    return started(what).result()


def said(output: str) -> int:
    """How many times the job says that rank 1 is lost."""
    return len(
        re.findall(rf"mlxtp: rank 1 on {HOST} d[^;]*; .*: all ranks end", output)
    )


def test_all_ranks_catch_it_in_the_graph() -> None:
    job = ended("is waited for in the graph")
    assert set(re.findall("caught .*", job.stdout)) == {
        "caught 0 silent [1]",
        "caught 2 silent [1]",
    }, job.stdout
    assert "saved" in job.stdout and said(job.stdout) == 0, job.stdout


def test_ranks_survive_where_mpirun_lets_them() -> None:
    """mpirun says nothing, and the status is the program's."""
    job = ended("survives")
    lines = sorted(job.stdout.splitlines())
    caught = [f"caught {rank} silent [1]" for rank in (0, 2)]
    assert lines == [*caught, "saved 0", "saved 2"], job.stdout
    assert job.returncode == 0


def test_who_does_not_catch_it_reads_one_sentence() -> None:
    job = ended("is not caught")
    assert job.returncode != 0 and said(job.stdout) == 1, job.stdout
    assert "Traceback" not in job.stdout and "saved" not in job.stdout


@pytest.mark.slow
def test_a_wait_in_python_raises() -> None:
    """Rank 2 waits for rank 0, which is told, too."""
    job = ended("is waited for in Python")
    assert set(re.findall("caught .*", job.stdout)) == {
        "caught 0 silent [1]",
        "caught 2 silent [1]",
    }, job.stdout


@pytest.mark.slow
def test_a_wait_in_mpi_ends_the_process() -> None:
    job = ended("is waited for in MPI")
    assert job.returncode != 0 and said(job.stdout) == 1, job.stdout
    assert "caught" not in job.stdout


@pytest.mark.slow
def test_a_rank_that_died_is_caught_before_mpirun_ends_all() -> None:
    job = ended("died")
    assert "caught 0 died [1]" in job.stdout and said(job.stdout) == 0, job.stdout


class Alone:
    """A transport of one rank, that does what a heartbeat asks of it."""

    rank = 0

    def bcast_object(self, value: Any, root: int) -> Any:
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        return [value]


LOST = Verdict("silent", (RankOnHost(1, "b"),), RankOnHost(0, "a"), None, 10)


def beating(monkeypatch: pytest.MonkeyPatch, *, raises: bool) -> tuple[Heartbeat, Mock]:
    """A heartbeat without a thread, and what ends its process instead."""
    monkeypatch.setattr(Heartbeat, "_run", lambda self: None)
    monkeypatch.setattr(heartbeat.ending, "wake_on_sigterm", lambda: (None, None))
    end = Mock(side_effect=SystemExit)
    monkeypatch.setattr(heartbeat.ending, "end_process", end)
    transport, limits = cast(Transport, Alone()), Limits(60, 10)
    return Heartbeat(transport, Progress(), limits, raises=raises), end


def test_a_program_that_is_not_to_raise_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beat, end = beating(monkeypatch, raises=False)
    with pytest.raises(SystemExit):
        beat.lose(LOST)
    assert end.call_args.args[0] == LOST and not beat.is_lost()


def test_a_main_thread_that_computes_has_two_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beat, end = beating(monkeypatch, raises=True)
    beat.lose(LOST)
    now = time.monotonic()
    beat._check_raised(now + 1.9, LOST)
    assert beat.is_lost() and not end.called
    with pytest.raises(SystemExit):
        beat._check_raised(now + 2.1, LOST)
    assert end.call_args.args[0] == LOST


def test_who_was_told_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    beat, end = beating(monkeypatch, raises=True)
    beat.lose(LOST)
    for call in (
        lambda: beat._progress.put_in_graph("allreduce", "mlp"),
        lambda: beat._progress.collective("barrier").__enter__(),
        lambda: beat.wait_until_all_raise(ValueError("no")),
    ):
        with pytest.raises(RankLostError) as raised:
            call()
        assert raised.value.verdict == LOST
    beat._check_raised(time.monotonic() + 100, LOST)
    beat._end_by_mpirun()
    assert not end.called


def test_one_rank_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """That which found it; the others wait for its word."""
    beat, end = beating(monkeypatch, raises=True)
    leave = Mock(side_effect=SystemExit)
    monkeypatch.setattr(heartbeat.ending, "end_silently", leave)
    beat._start_raising(LOST, 0.0)

    def listen(seconds: float) -> None:
        assert 0 < seconds <= 0.5
        beat._is_said = True

    monkeypatch.setattr(beat, "listen", listen)
    with pytest.raises(SystemExit):
        beat.end_lost(LOST)
    assert leave.called and not end.called


def test_a_verdict_that_is_told_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rank that has not noticed anything itself."""
    beat, _ = beating(monkeypatch, raises=True)
    beat.peers.append(Peer(1, "b"))
    beat._sockets[1] = Mock()
    beat._sockets[1].send.side_effect = lambda content: datagrams.append(content)
    datagrams: list[bytes] = []
    beat.lose(LOST)
    monkeypatch.setattr(beat, "_progress", Progress())
    beat._rank, beat.peers[0].rank = 1, 0
    incoming = iter(datagrams)
    beat._listening = Mock()

    def receive(_: int) -> bytes:
        try:
            return next(incoming)
        except StopIteration:
            raise BlockingIOError from None

    beat._listening.recv.side_effect = receive
    beat._hear()
    assert beat._progress.lost == LOST and beat.peers[0].heard

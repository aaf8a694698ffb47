"""A rank that dies, stops or leaves ends the job, soon, with a message and as data."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from needs import needs
from processes import is_running
from pyramid import sweep
from ranks import HOSTFILE, environment

from mlxtp.cluster.verdict import VERDICT_MARK, VERDICT_VARIABLE, Verdict
from mlxtp.comm import heartbeat, verdict
from mlxtp.comm.heartbeat import Heartbeat
from mlxtp.comm.launcher import LEAST_START_SECONDS
from mlxtp.comm.progress import Blocks, Progress
from mlxtp.comm.transports import Transport
from mlxtp.comm.verdict import Peer, ThisRank

HOST = os.uname().nodename
TIMEOUT_SECONDS = 3

# Ranks add for ever; rank 1 does at its 20th sum what the second argument says.
PROGRAM = """
import os, sys, time
import mlx.core as mx
import mlxtp
comm = mlxtp.Communicator.world(sys.argv[1], timeout_seconds=float(sys.argv[3]))
pids = comm.allgather_object(os.getpid())
if comm.rank == 0:
    print("pids", *pids, flush=True)
for number in range(100_000):
    mx.eval(comm.allreduce(mx.ones(100), at=f"model.layers.{number % 3}"))
    time.sleep(0.01)
    if comm.rank == 1 and number == 20:
        exec(sys.argv[2])
"""


# A sum of that program, and one that is started and waited for.
SUM = 'comm.allreduce(mx.ones(100), at=f"model.layers.{number % 3}")'
STARTED = SUM.replace("allreduce", "iallreduce") + ".wait()"
assert SUM in PROGRAM


class Job:
    """A running mpirun whose rank 0 prints the ranks' process numbers first."""

    def __init__(self, *arguments: object, ranks: int = 3) -> None:
        mpirun = Path(sys.executable).parent / "mpirun"
        command = [mpirun, "-hostfile", HOSTFILE, "-n", ranks, sys.executable]
        self._process = subprocess.Popen(
            [str(word) for word in [*command, *arguments]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**{VERDICT_VARIABLE: "1"}),
        )
        self.output = line = ""
        while not line.startswith("pids"):
            line = self._process.stdout.readline()
            self.output += line
            assert line, f"the job has ended: {self.output}"
        self.pids = [int(word) for word in line.split()[1:]]
        self.mpirun = self._process.pid

    def end(self, limit_seconds: float) -> tuple[int, float]:
        """Exit status and seconds till then; kills what lasts longer."""
        begin = time.monotonic()
        try:
            output, _ = self._process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            output, _ = self._process.communicate()
            pytest.fail(f"no end after {limit_seconds} s: {output}")
        self.output += output
        return self._process.returncode, time.monotonic() - begin

    def verdict(self) -> Verdict:
        """What the rank that ended the job told as data.

        MLX's ring raises where a rank is lost, so others may have failed as well.
        """
        lines = self.output.splitlines()
        told = [line for line in lines if line.startswith(VERDICT_MARK)]
        verdicts = [Verdict.from_json(line.removeprefix(VERDICT_MARK)) for line in told]
        [verdict] = [v for v in verdicts if v.why != "failed"] or verdicts
        return verdict

    def still_running(self, patience_seconds: float = 5) -> list[int]:
        """Which ranks have not ended by then."""
        deadline = time.monotonic() + patience_seconds
        while (left := [p for p in self.pids if is_running(p)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


pytestmark = [
    pytest.mark.once,
    needs("linux"),
]


def of(verdict: Verdict) -> list[int]:
    """The ranks that are lost, all of which are on this host."""
    assert {place.host for place in verdict.lost} <= {HOST}
    return [place.rank for place in verdict.lost]


def broken(
    transport: str, break_it: Callable[[Job], None], deed: str = "pass"
) -> tuple[Job, int, float]:
    job = Job("-c", PROGRAM, transport, deed, TIMEOUT_SECONDS)
    time.sleep(1.5)
    break_it(job)
    status, seconds = job.end(TIMEOUT_SECONDS + 25)
    assert job.still_running() == []
    return job, status, seconds


# Under the bare name "mpi" pytest-mpi would take a test for one of its own.
@pytest.mark.parametrize(
    "transport", sweep(["mpi", "mpi-eager", "ring"], ["mpi"]), ids="over {}".format
)
def test_a_rank_is_killed(transport: str) -> None:
    job, status, seconds = broken(
        transport, lambda job: os.kill(job.pids[1], signal.SIGKILL)
    )
    assert status != 0 and seconds < TIMEOUT_SECONDS + 5
    assert job.output.count(f"mlxtp: rank 1 on {HOST} died") == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == ("died", [1])
    assert verdict.sentence() in job.output
    if transport != "ring":
        assert verdict.reporter.rank == 0
        assert verdict.collective is not None and verdict.collective.number
        assert verdict.collective.layer.startswith("model.layers.")
        assert re.search(
            rf"; rank 0 on {HOST} (is|was last) in allreduce \d+ of "
            r"model\.layers\.\d: all ranks end",
            job.output,
        ), job.output


# Under the bare name "mpi" pytest-mpi would take a test for one of its own.
@pytest.mark.parametrize(
    "transport", sweep(["mpi", "mpi-eager", "ring"], ["mpi"]), ids="over {}".format
)
def test_a_rank_stops_answering(transport: str) -> None:
    job, status, seconds = broken(
        transport, lambda job: os.kill(job.pids[1], signal.SIGSTOP)
    )
    assert status != 0 and TIMEOUT_SECONDS - 1 < seconds < TIMEOUT_SECONDS + 5
    missing = f"mlxtp: rank 1 on {HOST} did not answer for {TIMEOUT_SECONDS} s"
    assert job.output.count(missing) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == ("silent", [1])
    assert verdict.limit_seconds == TIMEOUT_SECONDS


@pytest.mark.slow
def test_rank_0_is_killed() -> None:
    job, status, _ = broken("mpi", lambda job: os.kill(job.pids[0], signal.SIGKILL))
    assert status != 0
    assert f"mlxtp: rank 0 on {HOST} died; rank 1 on" in job.output, job.output


@pytest.mark.slow
def test_a_rank_is_killed_while_another_is_too_busy_to_answer() -> None:
    holds_the_lock = """
import ctypes, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCONT])
ctypes.PyDLL(None).sleep(60)
"""
    job, status, _ = broken(
        "mpi", lambda job: os.kill(job.pids[2], signal.SIGKILL), holds_the_lock
    )
    assert status != 0
    assert f"mlxtp: rank 2 on {HOST} died; rank 0 on" in job.output, job.output


@pytest.mark.parametrize(
    ("deed", "message", "why"),
    [
        ("sys.exit(0)", "left while others waited; rank [02] on", "left"),
        (
            "time.sleep(1000)",
            f"did not come within {TIMEOUT_SECONDS} s; rank [02] on",
            "late",
        ),
        ("1 / 0", "failed: all ranks end", "failed"),
    ],
)
def test_a_rank_does_something_else(deed: str, message: str, why: str) -> None:
    job, status, seconds = broken("mpi", lambda job: None, deed)
    assert status != 0 and seconds < TIMEOUT_SECONDS + 6
    told = re.findall(f"mlxtp: rank 1 on {HOST} {message}", job.output)
    assert len(told) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == (why, [1])


# Under the bare name "mpi" pytest-mpi would take a test for one of its own.
@pytest.mark.parametrize(
    "transport", sweep(["mpi", "mpi-eager", "ring"], ["mpi"]), ids="over {}".format
)
def test_a_rank_raises_and_catches_it(transport: str) -> None:
    """It says what it raised, instead of doing what the others do not wait for."""
    deed = """
try:
    with comm.raising_together():
        raise ValueError("no\\nway")
except ValueError:
    time.sleep(1000)
"""
    job, status, seconds = broken(transport, lambda job: None, deed)
    assert status != 0 and seconds < TIMEOUT_SECONDS + 6
    message = f"mlxtp: rank 1 on {HOST} raised ValueError: no way, where others did not"
    assert job.output.count(message) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == ("raised", [1])
    assert verdict.error == "ValueError: no way"


class Alone:
    """A transport of one rank, that does what a heartbeat asks of it."""

    rank = 0

    def bcast_object(self, value: Any, root: int) -> Any:
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        return [value]


def test_a_peer_is_heard_while_a_rank_that_raised_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it says in the middle of a look counts in the next one, as a whole."""
    # No thread and no handler of signals.
    monkeypatch.setattr(heartbeat.threading, "Thread", Mock())
    monkeypatch.setattr(heartbeat.ending, "wake_on_sigterm", lambda: (None, None))
    progress = Progress()
    beat = Heartbeat(cast(Transport, Alone()), progress, 60)
    progress.end_block(raised=True)
    peer = Peer(1, "b", heard=1.0, number=progress.number)
    monkeypatch.setattr(beat, "end_job", Mock(side_effect=AssertionError))
    monkeypatch.setattr(beat, "_tell", lambda: beat.peers.append(peer))
    has_raised, looks = verdict._has_raised, []

    def has_raised_and_hears(known: Peer, this: ThisRank) -> bool:
        answer = has_raised(known, this)
        looks.append(answer)
        if len(looks) == 2:  # of `judge_raised`
            peer.blocks = Blocks(*progress.blocks)
        return answer

    monkeypatch.setattr(verdict, "_has_raised", has_raised_and_hears)
    beat.wait_until_all_raise(ValueError("no"))
    assert looks == [False, False, True]


# Under the bare name "mpi" pytest-mpi would take a test for one of its own.
@pytest.mark.parametrize(
    "transport", sweep(["mpi", "mpi-eager"], ["mpi"]), ids="over {}".format
)
def test_a_rank_does_not_come_to_a_sum_that_was_started(transport: str) -> None:
    """What is waited for is named, as of any collective."""
    deed = "time.sleep(1000)"
    job = Job("-c", PROGRAM.replace(SUM, STARTED), transport, deed, TIMEOUT_SECONDS)
    assert job.end(TIMEOUT_SECONDS + 25)[0] != 0 and job.still_running() == []
    verdict = job.verdict()
    assert verdict.why == "late" and of(verdict) == [1]
    assert verdict.collective is not None and verdict.collective.waiting
    assert verdict.collective.name == "iallreduce"
    assert verdict.collective.layer.startswith("model.layers.")


@pytest.mark.slow
def test_a_rank_does_not_come() -> None:
    """MPI starts when all ranks have come, and lets no Python run until then."""
    program = """
import os, sys, time
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    time.sleep(1000)
print("pids", os.getpid(), flush=True)
import mlxtp
mlxtp.Communicator.world(timeout_seconds=float(sys.argv[1]))
"""
    job = Job("-c", program, TIMEOUT_SECONDS)
    status, seconds = job.end(LEAST_START_SECONDS + 25)
    assert status != 0 and seconds < LEAST_START_SECONDS + 10  # it imports first
    assert job.still_running() == []
    message = f"mlxtp: MPI did not start on {HOST} within {LEAST_START_SECONDS:g} s"
    assert job.output.count(message) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, verdict.lost) == ("not started", ())
    assert verdict.reporter.host == HOST


@pytest.mark.slow
def test_mpirun_is_ended() -> None:
    job, status, seconds = broken(
        "mpi", lambda job: os.kill(job.mpirun, signal.SIGTERM)
    )
    assert status != 0 and seconds < 10
    assert "mlxtp:" not in job.output and VERDICT_MARK not in job.output


@pytest.mark.slow
def test_mpirun_is_killed() -> None:
    """Nobody is left to end the ranks: they end themselves."""
    job, _, _ = broken("mpi", lambda job: os.kill(job.mpirun, signal.SIGKILL))
    assert "mlxtp:" not in job.output and VERDICT_MARK not in job.output


@pytest.mark.slow
def test_waits_without_a_limit() -> None:
    program = """
import sys, time
import mlxtp
comm = mlxtp.Communicator.world(timeout_seconds=1)
print("pids", flush=True) if comm.rank == 0 else None
with comm.unlimited():
    time.sleep(3 * comm.rank)
    comm.barrier()
"""
    job = Job("-c", program, ranks=2)
    assert job.end(30)[0] == 0, job.output

"""A rank that dies, stops or leaves ends the job, soon, with a message and as data."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Barrier
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
from mlxtp.comm.progress import Blocks, GraphState, Progress
from mlxtp.comm.transports import Transport
from mlxtp.comm.verdict import BEAT_SECONDS, Limits, Peer, ThisRank

HOST = os.uname().nodename
TIMEOUT_SECONDS = 3
SILENCE_SECONDS = 2
LIMITS = TIMEOUT_SECONDS, SILENCE_SECONDS

# In MLX's backends nothing limits how long a rank waits for one that is alive.
TRANSPORTS = ["mpi", "mpi-eager", "ring"]
WITH_LIMIT = ["mpi", "mpi-eager"]

# Ranks add for ever; rank 1 does at its 20th sum what the second argument says.
PROGRAM = """
import os, sys, time
import mlx.core as mx
import mlxtp
comm = mlxtp.Communicator.world(
    sys.argv[1],
    timeout_seconds=float(sys.argv[3]),
    silence_seconds=float(sys.argv[4]),
    measure=False,
    on_loss="end",
)
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


Ended = tuple[Job, int, float]


def broken(
    *arguments: object,
    break_it: Callable[[Job], None] = lambda job: None,
    ranks: int = 3,
    limit_seconds: float = TIMEOUT_SECONDS + 25,
) -> Ended:
    """A job that breaks, or is broken from outside, and its end."""
    job = Job("-c", *arguments, ranks=ranks)
    time.sleep(1.5)
    break_it(job)
    status, seconds = job.end(limit_seconds)
    assert job.still_running() == []
    return job, status, seconds


def send(number: signal.Signals, rank: int | None = None) -> Callable[[Job], None]:
    """Send a signal to a rank, or to mpirun."""
    return lambda job: os.kill(job.mpirun if rank is None else job.pids[rank], number)


SLEEP = "time.sleep(1000)"
RAISE = """
try:
    with comm.raising_together():
        raise ValueError("no\\nway")
except ValueError:
    time.sleep(1000)
"""

# Jobs wait most of their time, so several run at once, and each test takes its own.
POOL = ThreadPoolExecutor(4)


@cache
def jobs(transport: str) -> dict[str, Future[Ended]]:
    """Start a job for every way to break one; those that last longest come first."""

    def start(deed: str, program: str = PROGRAM, **how: Any) -> Future[Ended]:
        return POOL.submit(broken, program, transport, deed, *LIMITS, **how)

    started = {"stopped": start("pass", break_it=send(signal.SIGSTOP, 1))}
    if transport in WITH_LIMIT:
        started["leaves"] = start("sys.exit(0)")
        # In MLX's graph the next sum is called by then, but has not begun.
        started["late"] = start(f"total = {SUM}; {SLEEP}")
        started["late for what was started"] = start(
            SLEEP, PROGRAM.replace(SUM, STARTED)
        )
        started["fails"] = start("1 / 0")
    started["raises"] = start(RAISE)
    started["killed"] = start("pass", break_it=send(signal.SIGKILL, 1))
    return started


def over(transports: list[str]) -> pytest.MarkDecorator:
    """Run a test over each; under the name "mpi" pytest-mpi would take it for its."""
    values = sweep(transports, ["mpi"])
    return pytest.mark.parametrize("transport", values, ids="over {}".format)


@over(TRANSPORTS)
def test_a_rank_stops_answering(transport: str) -> None:
    job, status, seconds = jobs(transport)["stopped"].result()
    assert status != 0 and SILENCE_SECONDS - 1 < seconds < SILENCE_SECONDS + 5
    missing = f"mlxtp: rank 1 on {HOST} did not answer for {SILENCE_SECONDS} s"
    assert job.output.count(missing) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == ("silent", [1])
    assert verdict.limit_seconds == SILENCE_SECONDS


@over(TRANSPORTS)
def test_a_rank_is_killed(transport: str) -> None:
    job, status, seconds = jobs(transport)["killed"].result()
    assert status != 0 and seconds < TIMEOUT_SECONDS + 5
    assert job.output.count(f"mlxtp: rank 1 on {HOST} died") == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == ("died", [1])
    assert verdict.sentence() in job.output
    if transport in WITH_LIMIT:
        assert verdict.reporter.rank == 0
        assert verdict.collective is not None and verdict.collective.number
        assert verdict.collective.layer.startswith("model.layers.")
        assert re.search(
            rf"; rank 0 on {HOST} (is|was last) in allreduce \d+ of "
            r"model\.layers\.\d: all ranks end",
            job.output,
        ), job.output


@over(WITH_LIMIT)
@pytest.mark.parametrize(
    ("what", "message", "why"),
    [
        ("leaves", "left while others waited; rank [02] on", "left"),
        ("late", f"did not come within {TIMEOUT_SECONDS} s; rank [02] on", "late"),
        (
            "late for what was started",
            f"did not come within {TIMEOUT_SECONDS} s; rank [02] on",
            "late",
        ),
        ("fails", "failed: all ranks end", "failed"),
    ],
)
def test_a_rank_does_something_else(
    what: str, message: str, why: str, transport: str
) -> None:
    job, status, seconds = jobs(transport)[what].result()
    assert status != 0 and seconds < TIMEOUT_SECONDS + 6
    told = re.findall(f"mlxtp: rank 1 on {HOST} {message}", job.output)
    assert len(told) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == (why, [1])
    assert verdict.limit_seconds == TIMEOUT_SECONDS
    if why != "failed":  # what is waited for is named, also if it was only started
        name = "iallreduce" if what.endswith("started") else "allreduce"
        collective = verdict.collective
        assert collective is not None and collective.waiting and collective.number
        assert collective.name == name
        assert collective.layer.startswith("model.layers.")


@over(TRANSPORTS)
def test_a_rank_raises_and_catches_it(transport: str) -> None:
    """It says what it raised, instead of doing what the others do not wait for."""
    job, status, seconds = jobs(transport)["raises"].result()
    assert status != 0 and seconds < TIMEOUT_SECONDS + 6
    message = f"mlxtp: rank 1 on {HOST} raised ValueError: no way, where others did not"
    assert job.output.count(message) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, of(verdict)) == ("raised", [1])
    assert verdict.error == "ValueError: no way"


# Rank 1 takes no signals and holds Python's lock; rank 2 is killed meanwhile.
HOLD_THE_LOCK = """
import ctypes, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCONT])
ctypes.PyDLL(None).sleep(60)
"""

# Rank 1 is not heard and hears nobody any more, once all have heard each other.
CUT_OFF = """
while not all(peer.heard for peer in comm._heartbeat.peers):
    time.sleep(0.01)
time.sleep(1)
comm._heartbeat._key = "of another job"
"""


def cut_off(job: Job) -> None:
    """Stop mpirun until all ranks have ended, which they have to do by themselves."""
    os.kill(job.mpirun, signal.SIGSTOP)
    limit = SILENCE_SECONDS + 2 * heartbeat.LEAVE_SECONDS + 10
    left = job.still_running(patience_seconds=limit)
    os.kill(job.mpirun, signal.SIGCONT)
    assert left == [], "a rank that is cut off goes on by itself"


# MPI starts when all ranks have come, and lets no Python run until then.
DOES_NOT_COME = """
import os, sys, time
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    time.sleep(1000)
from mlxtp import Communicator
print("pids", os.getpid(), flush=True)
Communicator.world(timeout_seconds=float(sys.argv[1]))
"""

UNLIMITED = """
import sys, time
import mlxtp
comm = mlxtp.Communicator.world(timeout_seconds=1)
print("pids", flush=True) if comm.rank == 0 else None
with comm.unlimited():
    time.sleep(3 * comm.rank)
    comm.barrier()
"""


@cache
def slow_jobs() -> dict[str, Future[Ended]]:
    """Start the other jobs that break, and one that does not."""

    def start(deed: str, break_it: Callable[[Job], None]) -> Future[Ended]:
        arguments = (PROGRAM, "mpi", deed, *LIMITS)
        return POOL.submit(broken, *arguments, break_it=break_it)

    limit_seconds = LEAST_START_SECONDS + 25
    return {
        "does not come": POOL.submit(
            broken, DOES_NOT_COME, TIMEOUT_SECONDS, limit_seconds=limit_seconds
        ),
        "unlimited": POOL.submit(broken, UNLIMITED, ranks=2, limit_seconds=30),
        "mpirun is killed": start("pass", send(signal.SIGKILL)),
        "mpirun is ended": start("pass", send(signal.SIGTERM)),
        "rank 0 is killed": start("pass", send(signal.SIGKILL, 0)),
        "busy": start(HOLD_THE_LOCK, send(signal.SIGKILL, 2)),
        "cut off": start(CUT_OFF, cut_off),
    }


@pytest.mark.slow
def test_a_rank_does_not_come() -> None:
    job, status, seconds = slow_jobs()["does not come"].result()
    assert status != 0 and seconds < LEAST_START_SECONDS + 10
    message = f"mlxtp: MPI did not start on {HOST} within {LEAST_START_SECONDS:g} s"
    assert job.output.count(message) == 1, job.output
    verdict = job.verdict()
    assert (verdict.why, verdict.lost) == ("not started", ())
    assert verdict.reporter.host == HOST


@pytest.mark.slow
def test_rank_0_is_killed() -> None:
    job, status, _ = slow_jobs()["rank 0 is killed"].result()
    assert status != 0
    assert f"mlxtp: rank 0 on {HOST} died; rank 1 on" in job.output, job.output


@pytest.mark.slow
def test_a_rank_is_killed_while_another_is_too_busy_to_answer() -> None:
    job, status, _ = slow_jobs()["busy"].result()
    assert status != 0
    assert f"mlxtp: rank 2 on {HOST} died; rank 0 on" in job.output, job.output


@pytest.mark.slow
def test_a_rank_is_cut_off() -> None:
    """It ends like the others, and nobody ends it; who hear each other say so first."""
    job, status, _ = slow_jobs()["cut off"].result()
    assert status != 0
    lines = [line for line in job.output.splitlines() if " did not answer " in line]
    told = [line for line in lines if line.startswith("mlxtp: ")]
    assert told[0].startswith(f"mlxtp: rank 1 on {HOST} did not answer"), job.output
    alone = f"mlxtp: rank 0 on {HOST}, rank 2 on {HOST} did not answer"
    assert sum(line.startswith(alone) for line in told) == 1, job.output


@pytest.mark.slow
def test_mpirun_is_ended() -> None:
    job, status, seconds = slow_jobs()["mpirun is ended"].result()
    assert status != 0 and seconds < 10
    assert "mlxtp:" not in job.output and VERDICT_MARK not in job.output


@pytest.mark.slow
def test_mpirun_is_killed() -> None:
    """Nobody is left to end the ranks: they end themselves."""
    job, _, _ = slow_jobs()["mpirun is killed"].result()
    assert "mlxtp:" not in job.output and VERDICT_MARK not in job.output


@pytest.mark.slow
def test_waits_without_a_limit() -> None:
    job, status, _ = slow_jobs()["unlimited"].result()
    assert status == 0, job.output


class Alone:
    """A transport of one rank, that does what a heartbeat asks of it."""

    rank = 0

    def bcast_object(self, value: Any, root: int) -> Any:
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats have no thread that beats and no handler of signals."""
    monkeypatch.setattr(Heartbeat, "_run", lambda self: None)
    monkeypatch.setattr(heartbeat.ending, "wake_on_sigterm", lambda: (None, None))


def test_a_peer_is_heard_while_a_rank_that_raised_looks(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says in the middle of a look counts in the next one, as a whole."""
    progress = Progress()
    beat = Heartbeat(cast(Transport, Alone()), progress, Limits(60, 10))
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


def test_who_is_not_let_end_says_so_after_those_who_wait(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = Heartbeat(cast(Transport, Alone()), Progress(), Limits(60, 10))
    end_job = Mock()
    monkeypatch.setattr(beat, "end_job", end_job)
    with beat.finish():
        begin = time.monotonic()
        beat._check_finish(begin + 60 + BEAT_SECONDS)
        end_job.assert_not_called()
        beat._check_finish(begin + 65)
    [verdict] = end_job.call_args.args
    assert verdict.sentence().endswith(f"on {HOST} waited 60 s for the others to end")


class Pair(Alone):
    """One of two ranks, each in a thread."""

    def __init__(self, rank: int, both: Barrier, values: list[Any]) -> None:
        self.rank, self._both, self._values = rank, both, values

    def bcast_object(self, value: Any, root: int) -> Any:
        return self.allgather_object(value)[root]

    def allgather_object(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._both.wait()
        everything = list(self._values)
        self._both.wait()
        return everything


def pair(limits: Limits) -> list[Heartbeat]:
    """The heartbeats of two ranks that have made the first exchange."""
    both, values = Barrier(2), [None, None]

    def begin(rank: int) -> Heartbeat:
        transport = cast(Transport, Pair(rank, both, values))
        return Heartbeat(transport, Progress(), limits)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(begin, (0, 1)))


def test_all_have_heard_each_other_before_they_go_on(silent: None, capfd) -> None:
    """So each is missed from the first second on; and nobody waits for that."""
    begun = time.monotonic()
    beats = pair(Limits(60, 60))
    assert time.monotonic() - begun < heartbeat.HELLO_SECONDS
    assert all(peer.heard for beat in beats for peer in beat.peers)
    assert capfd.readouterr().err == ""


def test_a_firewall_ends_no_job(
    silent: None, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """Who was not heard, and came through the exchange, is not missed; it is said."""
    monkeypatch.setattr(Heartbeat, "_hear", lambda self: time.sleep(0.005))
    beats = pair(Limits(60, 0.6))
    for beat in beats:
        [peer] = beat.peers
        assert not peer.heard
        late = time.monotonic() + 100
        assert (
            verdict.judge(beat.peers, late, Limits(60, 10), beat._this_rank()) is None
        )
    said = capfd.readouterr().err
    assert said.startswith(
        f"mlxtp: rank 0 on {HOST} does not hear the heartbeat of rank 1"
    )
    assert said.count("mlxtp:") == 1 and "pairs such as this: 2" in said


def test_a_rank_that_is_lost_while_others_greet_it(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first exchange has silence's limit until all have come through it."""
    judged: list[Verdict | None] = []

    def greet(beat: Heartbeat) -> None:
        late = time.monotonic() + 10.1
        this = beat._this_rank()
        judged.append(verdict.judge(beat.peers, late, Limits(60, 10), this))

    monkeypatch.setattr(Heartbeat, "_greet", greet)
    pair(Limits(60, 10))
    assert [each and each.why for each in judged] == ["unconnected", "unconnected"]


def test_what_stands_in_the_graph_is_told(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks have called as many; one has begun less, and the other misses it."""
    both, values = Barrier(2), [None, None]
    states = [GraphState(2, "allreduce", "o_proj"), GraphState(3, "bcast", "", 61.0)]

    def begin(rank: int) -> Heartbeat:
        progress = Progress()
        transport = cast(Transport, Pair(rank, both, values))
        beat = Heartbeat(transport, progress, Limits(60, 10))
        for name, layer in [("allreduce", "o_proj"), ("bcast", ""), ("bcast", "head")]:
            progress.put_in_graph(name, layer)
        progress.graph = lambda: states[rank]
        return beat

    with ThreadPoolExecutor(2) as pool:
        beats = list(pool.map(begin, (0, 1)))
    for beat in beats:
        beat._tell()
    for beat in beats:
        beat.listen(5)
    # The first exchange is a collective, too.
    known = [(peer.number, peer.begun) for beat in beats for peer in beat.peers]
    assert known == [(4, 3), (4, 2)]
    reports: list[Verdict] = []
    monkeypatch.setattr(Heartbeat, "_report", lambda _, report: reports.append(report))
    for beat in beats:
        beat._check(time.monotonic())
    [report] = reports
    assert report.sentence() == (
        f"mlxtp: rank 0 on {HOST} did not come within 60 s; "
        f"rank 1 on {HOST} is in bcast 3: all ranks end"
    )

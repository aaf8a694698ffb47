"""What ranks tell each other, and how a job ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from ranks import mpirun

from mlxtp import Communicator
from mlxtp.cluster.verdict import VERDICT_MARK
from mlxtp.comm.errors import UsageError


def test_objects(comm: Communicator) -> None:
    assert comm.allgather_object(comm.rank) == list(range(comm.size))
    assert comm.bcast_object({"rank": comm.rank}) == {"rank": 0}
    assert comm.bcast_object(comm.rank, root=comm.size - 1) == comm.size - 1
    big = b"0123456789" * 1_000_000
    for root in range(comm.size):
        value = (root, big) if comm.rank == root else None
        assert comm.bcast_object(value, root) == (root, big)
    array = comm.bcast_object(mx.full((2, 3), comm.rank + 1, mx.bfloat16))
    assert mx.array_equal(array, mx.ones((2, 3), mx.bfloat16))
    comm.barrier()


def test_agreement(comm: Communicator) -> None:
    with comm.agreement():
        pass
    with pytest.raises(UsageError, match=r"^all of us$"), comm.agreement():
        raise OSError("all of us")
    last = comm.size - 1
    where = f"^rank {last} on .*: only me$" if comm.size > 1 else "^only me$"
    with pytest.raises(UsageError, match=where), comm.agreement():
        if comm.rank == last:
            raise ValueError("only me")


def test_a_bug_is_no_mistake_of_the_users(comm: Communicator) -> None:
    with pytest.raises(ZeroDivisionError), comm.agreement():
        _ = 1 / 0


@pytest.mark.once
@pytest.mark.parametrize("failing", ["{1}", "{0, 1, 2}"])
def test_an_exception_ends_all_ranks_and_is_printed_once(failing: str) -> None:
    program = f"""
import mlxtp
comm = mlxtp.Communicator.world()
if comm.rank in {failing}:
    raise RuntimeError("no " + "more")
comm.barrier()
"""
    begin = time.monotonic()
    done = mpirun("-n", 3, sys.executable, "-c", program, timeout_seconds=90)
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: no more") == 1
    assert VERDICT_MARK not in done.stderr  # nobody has asked for it
    assert f"mlxtp: rank {min(eval(failing))} on {os.uname().nodename}" in done.stderr
    assert time.monotonic() - begin < 30


# What `world` does to a process, besides starting MPI.
INSTALLED = """
import signal, sys, threading
import mlx.core as mx
import mlxtp
hooks = sys.excepthook, signal.getsignal(signal.SIGTERM)
comm = mlxtp.Communicator.world({arguments})
threads = [thread.name for thread in threading.enumerate()]
is_beating = "heartbeat" in threads
now = sys.excepthook, signal.getsignal(signal.SIGTERM)
assert (now[0] != hooks[0], now[1] != hooks[1]) == (is_beating, is_beating)
request = comm.iallreduce(mx.ones(100_000))
assert comm.allreduce(mx.ones(3)).tolist() == [comm.size] * 3
assert comm.allgather(mx.ones(1), [1] * comm.size).size == comm.size
assert request.wait().tolist() == [comm.size] * 100_000
with comm.unlimited():
    comm.barrier()
if comm.rank == 0:
    print(is_beating, comm.describe(), sep="\\n", flush=True)
"""


slow = pytest.mark.slow
UNTIMED = "allreduce: direct-one-shot, direct-two-shot"
IN_THE_GRAPH = "allreduce: gathers in the graph"


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "is_beating", "described"),
    [
        ("", True, "allreduce, ms "),
        pytest.param("heartbeat=False", False, "allreduce, ms ", marks=slow),
        ("measure=False, heartbeat=False", False, UNTIMED),
        pytest.param("'ring', heartbeat=False", False, IN_THE_GRAPH, marks=slow),
        pytest.param("'mpi-eager', measure=False", True, UNTIMED, marks=slow),
    ],
)
def test_what_world_installs(arguments: str, is_beating: bool, described: str) -> None:
    program = INSTALLED.format(arguments=arguments)
    done = mpirun("-n", 2, sys.executable, "-c", program, timeout_seconds=60)
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, tuning, *_ = done.stdout.splitlines()
    assert first == str(is_beating) and tuning.startswith(described)


@pytest.mark.once
@pytest.mark.parametrize(
    "wrong", [{"transport": "nccl"}, {"allreduce": "mpi"}, {"wire": "int4"}]
)
def test_names_that_do_not_exist(wrong: dict[str, str]) -> None:
    [(what, name)] = wrong.items()
    with pytest.raises(UsageError, match=f"{what} '{name}': wanted one of "):
        Communicator.world(**wrong)


@pytest.mark.once
def test_one_process_needs_no_mpi() -> None:
    program = """
import sys
sys.modules["mpi4py"] = None
import mlxtp
comm = mlxtp.Communicator.world()
assert (comm.rank, comm.size) == (0, 1)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.once
def test_an_mpirun_of_another_mpi_is_noticed(tmp_path: Path) -> None:
    program = "import mlxtp; mlxtp.Communicator.world()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PMI_SIZE": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "mpirun started 4 ranks, mpi4py sees 1" in done.stderr

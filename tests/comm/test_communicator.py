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
from mlxtp.comm.errors import UsageError


def test_objects(comm: Communicator) -> None:
    assert comm.allgather_object(comm.rank) == list(range(comm.size))
    assert comm.bcast_object({"rank": comm.rank}) == {"rank": 0}
    assert comm.bcast_object(comm.rank, root=comm.size - 1) == comm.size - 1
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
    assert f"mlxtp: rank {min(eval(failing))} on {os.uname().nodename}" in done.stderr
    assert time.monotonic() - begin < 30


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

"""A job that is killed while it fetches, and one that goes on where it was."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from hub_server import Hub
from reference import greedy
from tiny import Tiny

from mlxtp.checkpoint import verify

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
NAME = "org/model"

# Each rank on a machine of its own, with a cache of its own; rank 0 tells what came.
PROGRAM = """
import json, os, sys
from pathlib import Path
rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
os.environ["HF_HOME"] = f"{sys.argv[1]}/host-{rank}"
import numpy as np
import mlxtp
from mlxtp.fetch import hub
from mlxtp.fetch import rounds
from mlxtp.loading import load_model
from reference import greedy
comm = mlxtp.Communicator.world()
comm.host = f"host-{rank}"
fetched = [0]
fetch = hub.fetch
def counted(repo, file, offset, target, *more):
    fetch(repo, file, offset, target, *more)
    fetched[0] += target.size if offset else 0  # beginnings are for the hash
hub.fetch = counted
rounds.ROUND_BYTES = int(sys.argv[2])
model, _ = load_model(sys.argv[3], comm)
tokens = greedy(model)
figures = comm.allgather_object(fetched[0])
if comm.rank == 0:
    print(json.dumps({"tokens": tokens, "fetched": figures}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    Tiny(
        {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 32},
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub({NAME: model}) as hub:
        yield hub


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return greedy(mlx_lm.load(str(model))[0])


def start(
    hub: Hub, cache: Path, ranks: int, round_bytes: int = 10**8
) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = ["mpirun", "-hostfile", str(ROOT / "hostfiles/localhost"), "-n"]
    command += [str(ranks), sys.executable, "-c", PROGRAM]
    return subprocess.Popen(
        [*command, str(cache), str(round_bytes), NAME],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def result(job: "subprocess.Popen[str]") -> dict[str, Any]:
    output, errors = job.communicate(timeout=110)
    assert job.returncode == 0, output + errors
    return json.loads(output.splitlines()[-1])


def test_killed_in_the_middle_goes_on(
    hub: Hub, model: Path, expected: list[int], tmp_path: Path
) -> None:
    whole = (model / "model.safetensors").stat().st_size
    hub.delay_seconds = 0.05
    job = start(hub, tmp_path, 3, whole // 60)
    while hub.sent < whole // 2 and job.poll() is None:
        time.sleep(0.01)
    assert job.poll() is None, job.communicate()
    for pid in children(job.pid):
        os.kill(pid, 9)
    job.communicate(timeout=60)
    assert not list(tmp_path.glob("**/manifest.json"))
    hub.delay_seconds = 0
    done = result(start(hub, tmp_path, 3))
    assert done["tokens"] == expected
    # Columns are noted by the matrix, rows by the move.
    assert 0.2 * whole < sum(done["fetched"]) < 0.7 * whole
    for folder in tmp_path.glob("**/checkpoint.json"):
        assert not verify.verify(folder.parent)


def children(pid: int) -> list[int]:
    """The ranks that an mpirun has started here."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(word) for word in listed.stdout.split()]

"""Starting ranks on this machine, for benchmarks and tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HOSTFILE = Path(__file__).parent.parent / "hostfiles" / "localhost"


def environment(**more: str) -> dict[str, str]:
    """What mpirun is started with here, where ranks outnumber cores."""
    return {
        **os.environ,
        "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        **more,
    }


def mpirun(
    *arguments: object,
    hostfile: Path = HOSTFILE,
    stdin: str = "",
    timeout_seconds: float | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run mpirun with `arguments` behind the hostfile, and `env` set.

    Raises: subprocess.TimeoutExpired for a job that takes too long, after ending it.
    """
    command = [Path(sys.executable).parent / "mpirun", "-hostfile", hostfile]
    command += arguments
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
    ) as job:
        try:
            stdout, stderr = job.communicate(stdin, timeout=timeout_seconds)
        except BaseException:  # a test's limit, too
            job.terminate()  # mpirun ends its ranks; killed, it would leave them
            raise
    return subprocess.CompletedProcess(command, job.returncode, stdout, stderr)


def measured(
    ranks: int, *arguments: object, hostfile: Path = HOSTFILE, **env: str
) -> dict[str, Any]:
    """Run Python on `ranks` ranks; the JSON object that rank 0 prints last.

    Raises: RuntimeError with what the ranks said, if they fail.
    """
    done = mpirun("-n", ranks, sys.executable, *arguments, hostfile=hostfile, **env)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def print_on_rank_0(result: dict[str, Any]) -> None:
    """Print what `measured` reads; lines of several ranks could get mixed up."""
    if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        print(json.dumps(result), flush=True)

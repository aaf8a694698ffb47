"""The hosts that a batch system has given to this job: Slurm's or PBS's.

mpirun takes them by itself where it is given no hostfile. Only the standard library is
used.
"""

import os
import subprocess
from dataclasses import dataclass

from mlxtp.cluster import hostfile
from mlxtp.cluster.job import JobError


@dataclass(frozen=True)
class Allocation:
    """Hosts that `system` has given, in the order in which ranks are put on them."""

    system: str
    hosts: tuple[str, ...]


def allocation() -> Allocation | None:
    """Return what this job was given; None outside of Slurm's and PBS's jobs.

    Raises: JobError if the batch system's list cannot be read.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is not None:
        return Allocation("Slurm", tuple(_slurm_hosts(nodes)))
    file = os.environ.get("PBS_NODEFILE")
    if file is not None:
        try:
            return Allocation("PBS", tuple(hostfile.read(file)))
        except ValueError as error:
            raise JobError(f"PBS_NODEFILE: {error}") from None
    return None


def _slurm_hosts(nodes: str) -> list[str]:
    """Expand Slurm's list of hosts, such as studio[0-4], with Slurm's own program."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise JobError(
            f"SLURM_JOB_NODELIST is {nodes!r}, and scontrol does not tell its hosts: "
            f"give --hostfile HOSTFILE ({error})"
        ) from None
    return done.stdout.split()

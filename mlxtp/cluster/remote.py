"""Commands on other hosts, over what starts the ranks there: ssh, or mpirun's agent.

Only the standard library is used: `launch/` works before anything is installed.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence

from mlxtp.cluster.addresses import is_here

# Names what mpirun takes for ssh.
AGENT_VARIABLE = "PRTE_MCA_plm_ssh_agent"

# Nobody is there to type a password, and a host that sleeps must not hold up the rest.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=5"
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"


class HostError(Exception):
    """A command failed on a host: the last line of what it printed, and all `lines`."""

    def __init__(self, said: str) -> None:
        self.lines = [line.rstrip() for line in said.splitlines() if line.strip()]
        super().__init__(self.lines[-1].strip())


def agent(ssh: Sequence[str] = ("ssh",)) -> list[str]:
    """Return the words before a host's name: `ssh` with options, or mpirun's agent.

    What the environment names comes before the default, as for mpirun.
    """
    given = os.environ.get(AGENT_VARIABLE)
    if given is not None and list(ssh) == ["ssh"]:
        return shlex.split(given)
    return [*ssh, *SSH_OPTIONS.split(), *KEEP_ALIVE.split()]


def run_on(
    host: str,
    script: str,
    ssh: Sequence[str] = ("ssh",),
    *,
    given: bytes = b"",
    timeout_seconds: float | None = None,
) -> str:
    """Run a script for sh on a host; return what it prints.

    `given` is its standard input. On this machine it runs without ssh.

    Raises: HostError if it fails, or takes longer.
    """
    command = ["sh", "-c", script]
    if not is_here(host):
        # Whatever shell the user has there, sh reads the script.
        command = [*agent(ssh), host, f"exec sh -c {shlex.quote(script)}"]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=timeout_seconds
        )
    except OSError as error:
        raise HostError(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise HostError(f"no answer within {timeout_seconds:g} s") from None
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or output.strip()
        raise HostError(said or f"it ended with status {done.returncode}")
    return output

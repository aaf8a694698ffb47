"""What tests ask of single hosts of the lab."""

import subprocess
import sys

from five_hosts import HOSTS, good, lab

AGENT = ["sh", "/run/mlxtp-lab/agent"]
# Prints which addresses refuse a connection at a port that nobody listens on.
REACH = """
import select, socket, sys
waiting = {}
for address in sys.argv[1:]:
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex((address, 9))
    waiting[connection] = address
while ready := select.select([], list(waiting), [], 0.5)[1]:
    for connection in ready:
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        address = waiting.pop(connection)
        if error == 111:
            print(address)
"""


def cables(host: str) -> None:
    """Give a host its addresses and routes on the cables."""
    words = [sys.executable, "launch/cables", str(HOSTS.index(host) + 1), "5"]
    words += ["--left", "tb0", "--right", "tb1", "--os", "linux", "--apply"]
    good("run", "--on", host, *words)


def reached(source: str, *addresses: str) -> set[str]:
    """Return those of some addresses that a host reaches."""
    program = [sys.executable, "-c", REACH, *addresses]
    return set(good("run", "--on", source, *program).split())


def over_agent(source: str, host: str) -> subprocess.CompletedProcess[str]:
    """Ask a host for its name, as mpirun on `source` would."""
    return lab("run", "--on", source, *AGENT, host, "hostname")

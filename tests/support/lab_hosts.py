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
    """Give a host its addresses and routes in a ring of cables."""
    number = HOSTS.index(host) + 1
    ports = f"{number - 1 or 5}=tb0,{number % 5 + 1}=tb1"
    words = [sys.executable, "launch/cables", str(number), "5", "--ports", ports]
    good("run", "--on", host, *words, "--os", "linux", "--apply")


def reached(source: str, *addresses: str) -> set[str]:
    """Return those of some addresses that a host reaches."""
    program = [sys.executable, "-c", REACH, *addresses]
    return set(good("run", "--on", source, *program).split())


def over_agent(source: str, host: str) -> subprocess.CompletedProcess[str]:
    """Ask a host for its name, as mpirun on `source` would."""
    return lab("run", "--on", source, *AGENT, host, "hostname")

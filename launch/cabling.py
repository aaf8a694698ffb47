"""Commands that give a host its part of a ring of cables, and undo it."""

import shlex
from typing import NamedTuple

import over_ssh  # noqa: F401 (puts the checkout on Python's path)

from mlxtp.cluster import ring
from mlxtp.cluster.reroute import LINUX, MACOS, Route

# What the ports are called where nobody renamed them.
PORTS = {
    "macos": {"left": "en2", "right": "en3"},
    "linux": {"left": "thunderbolt0", "right": "thunderbolt1"},
}


class Step(NamedTuple):
    """A command and the one that undoes it.

    `clear` goes before `do` and removes what would be in its way; it may fail.
    """

    do: list[str]
    undo: list[str]
    clear: list[str] | None = None


class Host(NamedTuple):
    """Host `number` of `hosts`, 1 to `hosts`, and the names of its interfaces."""

    number: int
    hosts: int
    left: str
    right: str

    @property
    def address(self) -> str:
        """The address that all other hosts reach."""
        return ring.host_address(self.number)

    @property
    def ports(self) -> dict[str, str]:
        """Interface -> this host's address on the cable there."""
        ends = ring.ends(self.number, self.hosts)
        return {getattr(self, side): end.address for side, end in ends.items()}

    @property
    def routes(self) -> dict[str, Route]:
        """Another host's address -> how packets to it leave this one."""
        return {
            ring.host_address(other): Route(hop.gateway, getattr(self, hop.side))
            for other, hop in ring.routes(self.number, self.hosts).items()
        }


# Both ports of a host have its one address, and have it first. First, because that is
# the one of an interface that Open MPI uses (an alias of the Ethernet is passed over
# for the Ethernet's own). Both, because macOS sends from an address only through an
# interface that has it: see in_selectsrcif in ip_output.c of its kernel.


def linux(host: Host) -> list[Step]:
    """Return the commands of iproute2 for a host."""
    steps = [sysctl("net.ipv4.ip_forward")]
    for interface, address in host.ports.items():
        up = ["ip", "link", "set", interface, "up"]
        steps.append(Step(up, ["ip", "link", "set", interface, "down"]))
        for network in f"{host.address}/32", f"{address}/30":
            place = [network, "dev", interface]
            do, undo = ["ip", "address", "replace"], ["ip", "address", "del"]
            steps.append(Step(do + place, undo + place))
    for other, route in host.routes.items():
        do = LINUX.lay(other, route, host.address)
        steps.append(Step(do, LINUX.remove(other)))
    return steps


def macos(host: Host) -> list[Step]:
    """Return the commands of ifconfig and route for a host."""
    steps = [sysctl("net.inet.ip.forwarding")]
    for interface, address in host.ports.items():
        # A ring of bridges is a loop. That a port is no member does not matter.
        leave = ["ifconfig", "bridge0", "deletem", interface]
        up = ["ifconfig", interface, "up"]
        steps.append(Step(up, ["ifconfig", "bridge0", "addm", interface], leave))
        own = [host.address, "netmask", "255.255.255.255"]
        cable = [address, "netmask", "255.255.255.252", "alias"]
        for place in own, cable:
            inet = ["ifconfig", interface, "inet"]
            steps.append(Step(inet + place, [*inet, place[0], "-alias"]))
    for other, route in host.routes.items():
        do, delete = MACOS.lay(other, route, host.address), MACOS.remove(other)
        steps.append(Step(do, delete, delete))
    return steps


def sysctl(name: str) -> Step:
    """Return the command that switches a setting of the kernel on."""
    return Step(["sysctl", "-w", f"{name}=1"], ["sysctl", "-w", f"{name}=0"])


SYSTEMS = {"linux": linux, "macos": macos}


def script(steps: list[Step], undo: bool, prefix: list[str]) -> list[str]:
    """Return the commands as lines for a shell, each behind `prefix`."""
    lines = []
    for step in reversed(steps) if undo else steps:
        if step.clear and not undo:
            lines.append(shlex.join(prefix + step.clear) + " 2>/dev/null || true")
        lines.append(shlex.join(prefix + (step.undo if undo else step.do)))
    return lines

"""Addresses and routes of each host in a ring of cables, and commands for them.

Cable i joins the right port of host i with the left port of host i + 1, and cable N
host N with host 1 (two hosts have one cable).
"""

import shlex
from ipaddress import IPv4Address
from typing import NamedTuple

import over_ssh  # noqa: F401 (puts the checkout on Python's path)

from mlxtp.cluster.addresses import RING_ADDRESSES

CABLE_NETWORK = "10.88.0.0/16"
MOST_HOSTS = len(RING_ADDRESSES)

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
        return host_address(self.number)

    @property
    def ports(self) -> dict[str, str]:
        """Interface -> this host's address on the cable there."""
        ports = {self.left: cable_addresses(self.number - 1 or self.hosts)[1]}
        ports[self.right] = cable_addresses(self.number)[0]
        if self.hosts == 2:
            del ports[self.left if self.number == 1 else self.right]
        return ports

    @property
    def routes(self) -> dict[str, tuple[str, str]]:
        """Another host's address -> the neighbour's on the cable, and the interface."""
        routes = {}
        for other in range(1, self.hosts + 1):
            if other == self.number:
                continue
            if goes_right(self.number, other, self.hosts):
                hop = cable_addresses(self.number)[1], self.right
            else:
                hop = cable_addresses(self.number - 1 or self.hosts)[0], self.left
            routes[host_address(other)] = hop
        return routes


def host_address(host: int) -> str:
    """Return the address of host `host`, 1 or more, that all others reach."""
    return RING_ADDRESSES[host - 1]


def cable_addresses(cable: int) -> tuple[str, str]:
    """Return the addresses of a cable at host `cable` and at the next one.

    Each cable is a network of its own.
    """
    base = IPv4Address(CABLE_NETWORK.split("/")[0]) + 256 * cable
    return str(base + 1), str(base + 2)


def goes_right(host: int, other: int, hosts: int) -> bool:
    """Return whether the shorter route to `other` begins at the right port of `host`.

    Between opposite hosts of an even ring both routes are as long. Then both
    directions take the one that is to the right of the lower number.
    """
    right, left = (other - host) % hosts, (host - other) % hosts
    return right < left or (right == left and host < other)


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
    for other, (gateway, interface) in host.routes.items():
        route = [f"{other}/32", "via", gateway, "dev", interface, "src", host.address]
        do, undo = ["ip", "route", "replace"], ["ip", "route", "del"]
        steps.append(Step(do + route, undo + route))
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
    for other, (gateway, interface) in host.routes.items():
        route = ["-host", other, gateway, "-ifp", interface, "-ifa", host.address]
        delete = ["route", "-n", "delete", "-host", other]
        steps.append(Step(["route", "-n", "add", *route], delete, delete))
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

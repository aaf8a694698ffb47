"""What each host of a ring of cables needs: addresses, routes, and commands for them.

Cable i joins the right port of host i with the left port of host i + 1, and cable N
host N with host 1 (two hosts have one cable).
"""

import shlex
from ipaddress import IPv4Address
from typing import NamedTuple

from over_ssh import HOST_NETWORK

CABLE_NETWORK = "10.88.0.0/16"
MOST_HOSTS = 254

# What the ports are called where nobody renamed them.
PORTS = {
    "macos": {"left": "en2", "right": "en3"},
    "linux": {"left": "thunderbolt0", "right": "thunderbolt1"},
}


class Step(NamedTuple):
    """A command, the one that takes it back, and one whose failure is no matter.

    `clear` goes before `do` and removes what would be in its way.
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
        return host_address(self.number)

    @property
    def ports(self) -> dict[str, str]:
        """Interface -> this host's address on the cable that is plugged in there."""
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
    """The one address of a host that all others can reach."""
    return str(IPv4Address(HOST_NETWORK.split("/")[0]) + host)


def cable_addresses(cable: int) -> tuple[str, str]:
    """The addresses at host `cable` and at the next one, in a network of their own."""
    base = IPv4Address(CABLE_NETWORK.split("/")[0]) + 256 * cable
    return str(base + 1), str(base + 2)


def goes_right(host: int, other: int, hosts: int) -> bool:
    """Whether the short way from `host` to `other` leaves through the right port.

    Between opposite hosts of an even ring both ways are as long: the one that leaves
    the lower number to the right is taken, in both directions.
    """
    right, left = (other - host) % hosts, (host - other) % hosts
    return right < left or (right == left and host < other)


# Both ports of a host have its one address, and have it first. First, because that is
# the one of an interface that Open MPI uses (an alias of the Ethernet is passed over
# for the Ethernet's own). Both, because macOS sends from an address only through an
# interface that has it: see in_selectsrcif in ip_output.c of its kernel.


def linux(host: Host) -> list[Step]:
    steps = [sysctl("net.ipv4.ip_forward")]
    for interface, address in host.ports.items():
        up = ["ip", "link", "set", interface, "up"]
        steps.append(Step(up, ["ip", "link", "set", interface, "down"]))
        for place in [f"{host.address}/32"], [f"{address}/30"]:
            place += ["dev", interface]
            do, undo = ["ip", "address", "replace"], ["ip", "address", "del"]
            steps.append(Step(do + place, undo + place))
    for other, (gateway, interface) in host.routes.items():
        way = [f"{other}/32", "via", gateway, "dev", interface, "src", host.address]
        do, undo = ["ip", "route", "replace"], ["ip", "route", "del"]
        steps.append(Step(do + way, undo + way))
    return steps


def macos(host: Host) -> list[Step]:
    steps = [sysctl("net.inet.ip.forwarding")]
    for interface, address in host.ports.items():
        # A ring of bridges is a loop. A port that is no member is no matter.
        leave = ["ifconfig", "bridge0", "deletem", interface]
        up = ["ifconfig", interface, "up"]
        steps.append(Step(up, ["ifconfig", "bridge0", "addm", interface], leave))
        own = [host.address, "netmask", "255.255.255.255"]
        cable = [address, "netmask", "255.255.255.252", "alias"]
        for place in own, cable:
            inet = ["ifconfig", interface, "inet"]
            steps.append(Step(inet + place, [*inet, place[0], "-alias"]))
    for other, (gateway, interface) in host.routes.items():
        way = ["-host", other, gateway, "-ifp", interface, "-ifa", host.address]
        forget = ["route", "-n", "delete", "-host", other]
        steps.append(Step(["route", "-n", "add", *way], forget, forget))
    return steps


def sysctl(name: str) -> Step:
    return Step(["sysctl", "-w", f"{name}=1"], ["sysctl", "-w", f"{name}=0"])


SYSTEMS = {"linux": linux, "macos": macos}


def script(steps: list[Step], undo: bool, prefix: list[str]) -> list[str]:
    """Lines for a shell."""
    lines = []
    for step in reversed(steps) if undo else steps:
        if step.clear and not undo:
            lines.append(shlex.join(prefix + step.clear) + " 2>/dev/null || true")
        lines.append(shlex.join(prefix + (step.undo if undo else step.do)))
    return lines

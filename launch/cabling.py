"""Which cables there are, and the commands that give a host its part of them."""

import shlex
from collections.abc import Iterable, Mapping, Set
from ipaddress import ip_address, ip_network
from typing import NamedTuple

import over_ssh  # noqa: F401 (puts the checkout on Python's path)

from mlxtp.cluster import cables
from mlxtp.cluster.addresses import CABLE_NETWORK, RING_ADDRESSES
from mlxtp.cluster.cables import Cable
from mlxtp.cluster.ports import Port, Ports, is_switched
from mlxtp.cluster.reroute import LINUX, MACOS, Route

# What the ports of a host are called where nobody renamed them: the first of them.
FIRST_PORT = {"macos": ("en", 2), "linux": ("thunderbolt", 0)}

FORWARDING = {"macos": "net.inet.ip.forwarding", "linux": "net.ipv4.ip_forward"}


class Step(NamedTuple):
    """A command. One that `may_fail` removes what may not be there."""

    words: list[str]
    may_fail: bool = False


class Host(NamedTuple):
    """Host `number` of `hosts`, 1 to `hosts`, and what is to lead where.

    Args:
        cables: all that are to be used, between any hosts.
        ports: the interface of each neighbour's cable.
        there: the addresses that interfaces have as it is.
        laid: the addresses of other hosts that routes lead to as it is.
    """

    number: int
    hosts: int
    cables: Set[Cable]
    ports: Mapping[int, str]
    there: Mapping[str, list[str]] = {}
    laid: Iterable[str] = ()

    @property
    def address(self) -> str:
        """The address that all other hosts reach."""
        return cables.host_address(self.number)

    @property
    def ends(self) -> dict[str, str]:
        """Interface -> this host's address on the cable there."""
        return {
            interface: cables.end(self.number, other).address
            for other, interface in self.ports.items()
        }

    @property
    def routes(self) -> dict[str, Route]:
        """Another host's address -> how packets to it leave this one."""
        return {
            cables.host_address(other): Route(
                cables.end(self.number, neighbour).neighbour,
                self.ports[neighbour],
            )
            for other, neighbour in cables.routes(self.number, self.cables).items()
        }

    @property
    def stale(self) -> list[tuple[str, str]]:
        """Interfaces with an address that was for cables which are there no more."""
        return [
            (interface, address)
            for interface, address in on_cables(self.there)
            if address not in (self.address, self.ends.get(interface))
            or interface not in self.ends
        ]

    @property
    def lost(self) -> list[str]:
        """Addresses of hosts that routes lead to and no cable does."""
        return sorted({*self.laid} - {self.address, *self.routes})


def on_cables(there: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Return the interfaces with an address of ours, and that.

    An interface that has none of a host is no port of ours: other networks, such as
    Podman's, have the addresses of our cables as well.
    """
    cable_network = ip_network(CABLE_NETWORK)
    return [
        (interface, address)
        for interface, addresses in there.items()
        if not set(RING_ADDRESSES).isdisjoint(addresses)
        for address in addresses
        if address in RING_ADDRESSES or ip_address(address) in cable_network
    ]


# All ports of a host have its one address, and have it first. First, because that is
# the one of an interface that Open MPI uses (an alias of the Ethernet is passed over
# for the Ethernet's own). All, because macOS sends from an address only through an
# interface that has it: see in_selectsrcif in ip_output.c of its kernel.


def linux(host: Host) -> list[Step]:
    """Return the commands of iproute2 for a host."""
    steps = [Step(["sysctl", "-w", f"{FORWARDING['linux']}=1"])]
    steps += [Step(removed_linux(*place), True) for place in host.stale]
    steps += [Step(LINUX.remove(other), True) for other in host.lost]
    for interface, address in host.ends.items():
        steps.append(Step(["ip", "link", "set", interface, "up"]))
        for network in f"{host.address}/32", f"{address}/30":
            steps.append(Step(["ip", "address", "replace", network, "dev", interface]))
    for other, route in host.routes.items():
        steps.append(Step(LINUX.lay(other, route, host.address)))
    return steps


def removed_linux(interface: str, address: str) -> list[str]:
    """Return the command of iproute2 that takes an address from an interface."""
    prefix = 32 if address in RING_ADDRESSES else 30
    return ["ip", "address", "del", f"{address}/{prefix}", "dev", interface]


def undone_linux(there: Mapping[str, list[str]], laid: Iterable[str]) -> list[Step]:
    """Return the commands of iproute2 that take away what a host has of ours.

    `there` are the addresses of its interfaces, `laid` those that routes lead to. An
    interface that others may have switched on stays up.
    """
    words = [LINUX.remove(other) for other in laid]
    words += [removed_linux(*place) for place in on_cables(there)]
    ports = dict(on_cables(there))
    words += [
        ["ip", "link", "set", port, "down"] for port in ports if is_switched(port)
    ]
    words.append(["sysctl", "-w", f"{FORWARDING['linux']}=0"])
    return [Step(each, True) for each in words]


def macos(host: Host) -> list[Step]:
    """Return the commands of ifconfig and route for a host."""
    steps = [Step(["sysctl", "-w", f"{FORWARDING['macos']}=1"])]
    steps += [Step(removed_macos(*place), True) for place in host.stale]
    steps += [Step(MACOS.remove(other), True) for other in host.lost]
    for interface, address in host.ends.items():
        # Bridges in a circle are a loop. That a port is no member does not matter.
        steps.append(Step(["ifconfig", "bridge0", "deletem", interface], True))
        steps.append(Step(["ifconfig", interface, "up"]))
        own = [host.address, "netmask", "255.255.255.255"]
        cable = [address, "netmask", "255.255.255.252", "alias"]
        for place in own, cable:
            steps.append(Step(["ifconfig", interface, "inet", *place]))
    for other, route in host.routes.items():
        steps.append(Step(MACOS.remove(other), True))
        steps.append(Step(MACOS.lay(other, route, host.address)))
    return steps


def removed_macos(interface: str, address: str) -> list[str]:
    """Return the command of macOS that takes an address from an interface."""
    return ["ifconfig", interface, "inet", address, "-alias"]


def undone_macos(there: Mapping[str, list[str]], laid: Iterable[str]) -> list[Step]:
    """Return the commands of macOS that take away what a host has of ours.

    `there` are the addresses of its interfaces, `laid` those that routes lead to.
    """
    words = [MACOS.remove(other) for other in laid]
    words += [removed_macos(*place) for place in on_cables(there)]
    ports = dict(on_cables(there))
    words += [["ifconfig", "bridge0", "addm", port] for port in ports]
    words.append(["sysctl", "-w", f"{FORWARDING['macos']}=0"])
    return [Step(each, True) for each in words]


SYSTEMS = {"linux": linux, "macos": macos}
UNDONE = {"linux": undone_linux, "macos": undone_macos}


def script(steps: list[Step], prefix: list[str]) -> list[str]:
    """Return the commands as lines for a shell, each behind `prefix`."""
    ending = {True: " 2>/dev/null || true", False: ""}
    return [shlex.join(prefix + step.words) + ending[step.may_fail] for step in steps]


def in_order(number: int, hosts: int) -> list[int]:
    """Return the hosts that the ports of host `number` are to lead to, port by port.

    The first leads to the host before, the others to those behind, one after the
    other. A ring needs the first two, and becomes a mesh with more cables.
    """
    behind = [(number - 1 + step) % hosts + 1 for step in range(1, hosts - 1)]
    return [number - 1 or hosts, *behind]


def usual_ports(
    number: int, hosts: int, used: Set[Cable], system: str
) -> dict[int, str]:
    """Return the interface to each neighbour, where ports are used in order."""
    name, first = FIRST_PORT[system]
    there = cables.neighbours(number, used)
    ordered = [other for other in in_order(number, hosts) if other in there]
    return {other: f"{name}{first + place}" for place, other in enumerate(ordered)}


class HostPort(NamedTuple):
    """A port of a host."""

    number: int
    port: Port


# A cable -> the ports that it joins, that of the lower number first.
JoinedPorts = dict[Cable, tuple[HostPort, HostPort]]


def joined_ports(hosts: Mapping[int, Ports]) -> JoinedPorts:
    """Return the cables between hosts, from what their ports hear.

    Between two hosts the first cable counts. A port that hears several others is one of
    a network, and has no cable. Where neither end hears the other, a cable is there as
    long as both have its addresses: a busy host may miss an echo.
    """
    ports = [HostPort(n, port) for n, seen in hosts.items() for port in seen.ports]
    owner = {name: port for port in ports for name in port.port.own}
    heard: dict[HostPort, set[HostPort]] = {port: set() for port in ports}
    for port in ports:
        for name in port.port.heard:
            other = owner.get(name, port)
            if other.number != port.number:
                heard[port].add(other)
                heard[other].add(port)
    result: JoinedPorts = {}
    for port, others in heard.items():
        for other in others:
            if len(others) == len(heard[other]) == 1 and port.number < other.number:
                result.setdefault(Cable(port.number, other.number), (port, other))
    silent = {
        (port.number, address): port
        for port, others in heard.items()
        if not others and not port.port.heard
        for address in hosts[port.number].addresses.get(port.port.interface, ())
    }
    for low, high in cables.mesh(max(hosts)):
        at = cables.end(low, high)
        one, two = silent.get((low, at.address)), silent.get((high, at.neighbour))
        if one is not None and two is not None:
            result.setdefault(Cable(low, high), (one, two))
    return dict(sorted(result.items()))


def lacking(
    hosts: Mapping[int, Ports], total: int, there: JoinedPorts, wanted: Set[Cable]
) -> dict[Cable, tuple[Port | None, Port | None]]:
    """Return the cables that are wanted and not there, with free ports for each.

    `hosts` are those of `total` that have answered. A port is None where a host has
    none that is free.
    """
    taken = {port for ports in there.values() for port in ports}
    free = {
        n: [port for port in seen.ports if HostPort(n, port) not in taken]
        for n, seen in hosts.items()
    }

    def take(number: int, other: int) -> Port | None:
        ports = hosts[number].ports
        place = in_order(number, total).index(other)
        usual = ports[place] if place < len(ports) else None
        chosen = usual if usual in free[number] else next(iter(free[number]), None)
        if chosen is not None:
            free[number].remove(chosen)
        return chosen

    missing = sorted(wanted - there.keys())
    return {c: (take(c.low, c.high), take(c.high, c.low)) for c in missing}


def circle(used: Set[Cable], hosts: int) -> list[int]:
    """Return all hosts in the order of a ring of cables; empty if they are none."""
    order = [1]
    while len(order) < hosts:
        there = [n for n in cables.neighbours(order[-1], used) if n not in order]
        if not there:
            return []
        order.append(there[0])
    closes = len(used) == hosts and cables.between(order[-1], 1) in used
    return order if closes and hosts > 2 else []

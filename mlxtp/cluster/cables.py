"""Cables between hosts: their addresses, the routes over them, and which answer.

Hosts count from 1, in the order of the hostfile. Each two may be joined by a cable. A
ring and a mesh are two choices of cables; the rules hold for any other as well, such as
a mesh that lacks some, or what is left of a ring when a host is lost. Only the standard
library is used.
"""

import json
import re
import socket
import sys
from collections import defaultdict
from collections.abc import Container, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from ipaddress import IPv4Address
from itertools import combinations
from typing import NamedTuple

from mlxtp.cluster.addresses import CABLE_NETWORK, RING_ADDRESSES
from mlxtp.cluster.commands import output

# The last byte of a cable's address has room for numbers that are 64 apart.
MOST_HOSTS = 65

# Nobody listens there: a host that is there refuses at once.
CLOSED_PORT = 9
ANSWER_SECONDS = 1.0


class Cable(NamedTuple):
    """The cable between two hosts, the lower number first."""

    low: int
    high: int

    def __str__(self) -> str:
        """Write it as it is given: 2-3."""
        return f"{self.low}-{self.high}"


class End(NamedTuple):
    """An end of a cable: its own address there, and that of the neighbour."""

    address: str
    neighbour: str


def between(a: int, b: int) -> Cable:
    """Return the cable between two hosts."""
    return Cable(min(a, b), max(a, b))


def ring(hosts: int) -> frozenset[Cable]:
    """Return the cables from each host to the next, and from the last to the first."""
    return frozenset(between(host, host % hosts + 1) for host in range(1, hosts + 1))


def mesh(hosts: int) -> frozenset[Cable]:
    """Return a cable for each pair of hosts."""
    return frozenset(Cable(a, b) for a, b in combinations(range(1, hosts + 1), 2))


TOPOLOGIES = {"ring": ring, "mesh": mesh}


def parse(text: str, hosts: int) -> frozenset[Cable]:
    """Read a topology: "ring", "mesh", or cables such as 1-2,2-3.

    Raises: ValueError for what is none, or names other hosts.
    """
    if text in TOPOLOGIES:
        return TOPOLOGIES[text](hosts)
    words = [word for word in text.split(",") if word]
    known = {str(cable): cable for cable in mesh(hosts)}
    for word in words:
        if word not in known:
            raise ValueError(
                f"wanted ring, mesh, or cables between hosts 1 to {hosts} such as "
                f"1-2,2-3, not {text!r}"
            )
    return frozenset(known[word] for word in words)


def listed(cables: Iterable[Cable]) -> str:
    """Write cables as `parse` reads them."""
    return ",".join(map(str, sorted(cables)))


def named(cables: Set[Cable], hosts: int) -> str:
    """Write a topology as shortly as `parse` reads it."""
    for topology, cables_of in TOPOLOGIES.items():
        if cables == cables_of(hosts):
            return topology
    return listed(cables)


def host_address(host: int) -> str:
    """Return the address of a host that all others reach."""
    return RING_ADDRESSES[host - 1]


def end(number: int, other: int) -> End:
    """Return the end at host `number` of its cable to host `other`.

    Each cable is a network of its own, 10.88.LOW.0/30 where it joins a host with the
    next number. One to the host after that is 10.88.LOW.4/30, and so on. So addresses
    stay the same where more hosts have cables than take part in a job.
    """
    low, high = between(number, other)
    base = IPv4Address(CABLE_NETWORK.split("/")[0]) + 256 * low + 4 * (high - low - 1)
    ends = str(base + 1), str(base + 2)
    return End(*ends) if number == low else End(*ends[::-1])


def neighbours(number: int, cables: Iterable[Cable]) -> list[int]:
    """Return the hosts at the other ends of the cables of host `number`."""
    return sorted(a + b - number for a, b in cables if number in (a, b))


def routes(number: int, cables: Set[Cable]) -> dict[int, int]:
    """Return the neighbour through which host `number` reaches each other one.

    It is on the shortest way. Of several as short that one is taken whose cables join
    the closer numbers: in a ring, between opposite hosts, the one without the cable
    from the last host to the first. So there is one way between two hosts. Where all
    know of the same cables every route arrives, and the way back passes the same
    cables. A host that no way reaches is left out.
    """
    by_span = sorted(cables, key=lambda cable: (cable.high - cable.low, cable))
    joined = defaultdict(list)
    for place, (a, b) in enumerate(by_span):
        joined[a].append((b, 1 << place))
        joined[b].append((a, 1 << place))
    through: dict[int, int] = {}
    # Hops, the cables as bits (which no two ways between two hosts share), the host
    # that is reached, and the neighbour through which it is.
    ways = [(0, 0, number, number)]
    while ways:
        hops, passed, here, first = heappop(ways)
        if here in through:
            continue
        through[here] = first
        for there, bit in joined[here]:
            neighbour = there if here == number else first
            heappush(ways, (hops + 1, passed | bit, there, neighbour))
    del through[number]
    return dict(sorted(through.items()))


def addresses(up: bool = False) -> dict[str, list[str]]:
    """Return the IPv4 addresses of each interface of this host; empty if unknown.

    With `up` interfaces that are switched off are left out.
    """
    if sys.platform == "darwin":
        return read_ifconfig(output("ifconfig"), up)
    return read_ip_address(output("ip", "-json", "address"), up)


def interfaces(up: bool = False) -> dict[str, str]:
    """Return the interface of every IPv4 address of this host.

    An address that several interfaces have is given for the first. With `up` interfaces
    that are switched off are left out.
    """
    result: dict[str, str] = {}
    for interface, own in addresses(up).items():
        for address in own:
            result.setdefault(address, interface)
    return result


def read_ip_address(text: str, up: bool) -> dict[str, list[str]]:
    """Read what `ip -json address` of Linux prints, as `addresses` returns it."""
    return {
        entry["ifname"]: [
            address["local"]
            for address in entry["addr_info"]
            if address["family"] == "inet"
        ]
        for entry in json.loads(text or "[]")
        if entry and ("UP" in entry["flags"] or not up)
    }


def read_ifconfig(text: str, up: bool) -> dict[str, list[str]]:
    """Read what `ifconfig` of macOS prints, as `addresses` returns it."""
    blocks = re.split(r"^(?=\S)", text, flags=re.M)
    return {
        block.partition(":")[0]: re.findall(r"^\s+inet (\S+)", block, re.M)
        for block in blocks
        if block and (re.search(r"[<,]UP[,>]", block) or not up)
    }


def laid(number: int, hosts: int, known: Container[str]) -> dict[int, End]:
    """Return the ends of cables at host `number` that have addresses, by neighbour.

    `known` are all addresses of the host.
    """
    others = (other for other in range(1, hosts + 1) if other != number)
    possible = {other: end(number, other) for other in others}
    return {other: at for other, at in possible.items() if at.address in known}


def answering(number: int, hosts: int) -> dict[int, bool]:
    """Return for each cable of this host, host `number`, whether its end answers.

    Cables go by the neighbour's number. A neighbour whose firewall refuses no
    connection may still answer the command `ping`. It takes up to about
    `ANSWER_SECONDS`.
    """
    own = laid(number, hosts, interfaces())
    probes = refuses, echoes
    with ThreadPoolExecutor(max(1, len(probes) * len(own))) as pool:
        asked = {
            other: [pool.submit(probe, at) for probe in probes]
            for other, at in own.items()
        }
        return {
            other: any(future.result() for future in futures)
            for other, futures in asked.items()
        }


def refuses(end: End) -> bool:
    """Return whether a neighbour answers to a connection, on the cable itself."""
    with socket.socket() as probe:
        probe.settimeout(ANSWER_SECONDS)
        try:
            # Never by way of a router, which might answer in its place.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
            probe.bind((end.address, 0))
            probe.connect((end.neighbour, CLOSED_PORT))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return True


def echoes(end: End) -> bool:
    """Return whether a neighbour answers the command `ping`, on the cable itself."""
    mac = sys.platform == "darwin"
    own = ["-t", "1", "-S"] if mac else ["-W", "1", "-I"]
    # -r: never by way of a router.
    said = output("ping", "-r", "-n", "-c", "1", *own, end.address, end.neighbour)
    return re.search(r"\b1 (packets )?received", said) is not None

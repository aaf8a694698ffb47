"""A ring of cables: addresses, routes, and which cables of this host answer.

Cable i joins the right port of host i with the left port of host i + 1, and cable N
host N with host 1 (two hosts have cable 1 alone). Hosts and cables count from 1. A
host that is lost is one whose cables are both broken. Only the standard library is
used.
"""

import json
import re
import socket
import sys
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from typing import Literal, NamedTuple

from mlxtp.cluster.addresses import CABLE_NETWORK, RING_ADDRESSES
from mlxtp.cluster.commands import output

MOST_HOSTS = len(RING_ADDRESSES)

# Nobody listens there: a host that is there refuses at once.
CLOSED_PORT = 9
ANSWER_SECONDS = 1.0

Side = Literal["left", "right"]


class End(NamedTuple):
    """An end of a cable: its own address there, and that of the neighbour."""

    cable: int
    address: str
    neighbour: str


class Hop(NamedTuple):
    """Where a route leaves a host: the neighbour's address on the cable, and the side.

    The side is that of the host's port.
    """

    gateway: str
    side: Side


def host_address(host: int) -> str:
    """Return the address of a host that all others reach."""
    return RING_ADDRESSES[host - 1]


def cable_addresses(cable: int) -> tuple[str, str]:
    """Return the addresses of a cable at host `cable` and at the next one.

    Each cable is a network of its own.
    """
    base = IPv4Address(CABLE_NETWORK.split("/")[0]) + 256 * cable
    return str(base + 1), str(base + 2)


def ends(number: int, hosts: int) -> dict[Side, End]:
    """Return the ends of cables at host `number`, the left one first."""
    before = number - 1 or hosts
    theirs, left = cable_addresses(before)
    right, next_one = cable_addresses(number)
    both: dict[Side, End] = {
        "left": End(before, left, theirs),
        "right": End(number, right, next_one),
    }
    if hosts == 2:
        del both["left" if number == 1 else "right"]
    return both


def goes_right(host: int, other: int, hosts: int) -> bool:
    """Return whether the shorter route to `other` begins at the right port of `host`.

    Between opposite hosts of an even ring both routes are as long. Then both
    directions take the one that is to the right of the lower number.
    """
    right, left = (other - host) % hosts, (host - other) % hosts
    return right < left or (right == left and host < other)


def routes(number: int, hosts: int, broken: Set[int] = frozenset()) -> dict[int, Hop]:
    """Return how host `number` reaches each other one, by the other's number.

    It is the shorter way round that has no broken cable; a host that no way reaches is
    left out. Where all hosts know of the same broken cables, every route arrives, and
    the way back passes the same cables.
    """
    own = ends(number, hosts)
    result = {}
    for other in range(1, hosts + 1):
        if other == number:
            continue
        sides: list[Side] = ["right", "left"]
        if not goes_right(number, other, hosts):
            sides.reverse()
        for side in sides:
            if side in own and broken.isdisjoint(way(number, other, hosts, side)):
                result[other] = Hop(own[side].neighbour, side)
                break
    return result


def way(host: int, other: int, hosts: int, side: Side) -> list[int]:
    """Return the cables from a host to another that begin at its port `side`."""
    if side == "left":
        return way(other, host, hosts, "right")[::-1]
    return [(host - 1 + step) % hosts + 1 for step in range((other - host) % hosts)]


def interfaces() -> dict[str, str]:
    """Return the interface of every IPv4 address of this host; empty if unknown."""
    if sys.platform == "darwin":
        return read_ifconfig(output("ifconfig"))
    return read_ip_address(output("ip", "-json", "address"))


def read_ip_address(text: str) -> dict[str, str]:
    """Read what `ip -json address` of Linux prints, as `interfaces` returns it.

    An address that several interfaces have is given for the first.
    """
    result: dict[str, str] = {}
    for entry in json.loads(text or "[]"):
        for address in entry.get("addr_info", []):
            if address["family"] == "inet":
                result.setdefault(address["local"], entry["ifname"])
    return result


def read_ifconfig(text: str) -> dict[str, str]:
    """Read what `ifconfig` of macOS prints, as `interfaces` returns it."""
    result: dict[str, str] = {}
    for block in re.split(r"^(?=\S)", text, flags=re.M):
        name = block.partition(":")[0]
        for address in re.findall(r"^\s+inet (\S+)", block, re.M):
            result.setdefault(address, name)
    return result


def answering(number: int, hosts: int) -> dict[int, bool]:
    """Return for each cable of this host, number `number`, whether its end answers.

    A neighbour whose firewall refuses no connection may still answer the command
    `ping`. It takes up to about `ANSWER_SECONDS`.
    """
    own = list(ends(number, hosts).values())
    probes = refuses, echoes
    with ThreadPoolExecutor(len(own) * len(probes)) as pool:
        asked = {
            end.cable: [pool.submit(probe, end) for probe in probes] for end in own
        }
        return {
            cable: any(future.result() for future in futures)
            for cable, futures in asked.items()
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

"""Addresses of hosts: those on the cables, and which of them are this machine's."""

import os
import socket
from collections.abc import Iterable
from functools import cache
from typing import Any

# `launch/cables` gives each host one address here that all others reach.
RING_NETWORK = "10.89.0.0/24"
RING_ADDRESSES = [f"10.89.0.{host}" for host in range(1, 255)]
# The networks of the ends of each cable.
CABLE_NETWORK = "10.88.0.0/16"

# "0": the cables are not to be used, the job takes the Ethernet. mpirun hands it to the
# ranks.
CABLES_VARIABLE = "MLXTP_CABLES"
# What Open MPI is to leave alone then, besides loopback: it pairs all else.
WITHOUT_CABLES = f"127.0.0.0/8,{CABLE_NETWORK},{RING_NETWORK}"


def ring_address() -> str | None:
    """Return this host's address on the cables; None if it has none.

    None as well where `CABLES_VARIABLE` says that the cables are not to be used.
    """
    if not uses_cables():
        return None
    return next((address for address in RING_ADDRESSES if _is_local(address)), None)


def uses_cables() -> bool:
    """Return whether cables, where there are any, are to be used."""
    return os.environ.get(CABLES_VARIABLE) != "0"


def own_address(hosts: Iterable[str]) -> str:
    """Return the address under which ranks on `hosts` reach this host.

    Its address on the cables comes before any other. With no other host it is loopback.
    """
    others = {host for host in hosts if host != socket.gethostname()}
    if not others:
        return "127.0.0.1"
    # A route to any address will do where the others' names do not resolve.
    towards = (_source_towards(host) for host in [*sorted(others), "192.0.2.1"])
    return ring_address() or next(filter(None, towards), "127.0.0.1")


@cache
def is_here(host: str) -> bool:
    """Return whether `host`, a name or an address, is this machine."""
    own = socket.gethostname().removesuffix(".local")
    # In Bonjour no two machines have one name.
    if host == "localhost" or host.removesuffix(".local") == own:
        return True
    try:
        resolved = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return any(_can_bind(family, address) for family, *_, address in resolved)


def _is_local(address: str) -> bool:
    return _can_bind(socket.AF_INET, (address, 0))


def _can_bind(family: int, address: tuple[Any, ...]) -> bool:
    """Return whether a socket can take `address`: only this machine's own can."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _source_towards(host: str) -> str | None:
    """Return the address that packets to `host` leave from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address

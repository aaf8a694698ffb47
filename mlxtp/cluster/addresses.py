"""Under which address the other hosts reach this one."""

import socket
from collections.abc import Iterable

# The addresses of the hosts in a ring of cables, as `launch/ring` gives them.
RING_NETWORK = "10.89.0.0/24"
RING_ADDRESSES = [f"10.89.0.{host}" for host in range(1, 255)]


def ring_address() -> str | None:
    """This host's address in the ring of cables; None if it has none."""
    return next((address for address in RING_ADDRESSES if _is_local(address)), None)


def own_address(hosts: Iterable[str]) -> str:
    """The address under which ranks on `hosts` reach this host.

    That in the ring of cables before any other. On one host alone, loopback.
    """
    others = {host for host in hosts if host != socket.gethostname()}
    if not others:
        return "127.0.0.1"
    # A route to any address will do where the others' names do not resolve.
    towards = (_source_towards(host) for host in [*sorted(others), "192.0.2.1"])
    return ring_address() or next(filter(None, towards), "127.0.0.1")


def _is_local(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _source_towards(host: str) -> str | None:
    """The address that packets to `host` leave from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address

"""The paths of packets between ranks, followed from route to route."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.doctor.facts import Route
from mlxtp.doctor.machine import Machine

# For each rank: its routes by the address of another rank; None where it has none.
Routes = Sequence[Mapping[str, Route | None]]


@dataclass(frozen=True)
class PacketPath:
    """The ranks that packets pass, with both ends, as far as routes lead.

    `stopped` says why they end before the target: "no route", or "astray" where they
    leave the cables or go in circles; it is empty where packets arrive.
    """

    ranks: tuple[int, ...]
    stopped: str = ""

    @property
    def hops(self) -> int:
        """How many links packets take."""
        return len(self.ranks) - 1

    @property
    def cables(self) -> list[tuple[int, int]]:
        """The links that packets take, as (lower rank, higher rank)."""
        return [
            (min(a, b), max(a, b))
            for a, b in zip(self.ranks, self.ranks[1:], strict=False)
        ]


def follow(machines: Sequence[Machine], routes: Routes, a: int, b: int) -> PacketPath:
    """Follow packets from rank `a` to rank `b`."""
    target = machines[b].address
    passed = [a]
    if machines[a].host == machines[b].host:
        return PacketPath((a, b))
    while passed[-1] != b:
        here = machines[passed[-1]]
        route = routes[here.rank].get(target)
        if route is None:
            return PacketPath(tuple(passed), "no route")
        if target not in RING_ADDRESSES:
            return PacketPath(
                (a, b)
            )  # how a network without our cables routes is not known
        if here.address in RING_ADDRESSES and not _has(here, route.interface):
            return PacketPath(tuple(passed), "astray")
        after = b if route.gateway is None else _owner(machines, route.gateway)
        if after is None or after in passed:
            return PacketPath(tuple(passed), "astray")
        passed.append(after)
    return PacketPath(tuple(passed))


def _has(machine: Machine, name: str) -> bool:
    """Whether an interface has the machine's address, and so is one of its cables."""
    interface = machine.interface(name)
    return interface is not None and machine.address in interface.addresses


def _owner(machines: Sequence[Machine], address: str) -> int | None:
    return next((m.rank for m in machines if address in m.addresses), None)

"""The ways between ranks, followed from route to route as packets are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.doctor.facts import Route
from mlxtp.doctor.machine import Machine

# Of each rank, by address of another: None where there is no way.
Routes = Sequence[Mapping[str, Route | None]]


@dataclass(frozen=True)
class Path:
    """The ranks that packets pass, the ends included, as far as routes lead.

    `stopped` is why they lead no farther: "no route", "astray" for a way that leaves
    the cables or goes in circles; empty where they arrive.
    """

    ranks: tuple[int, ...]
    stopped: str = ""

    @property
    def hops(self) -> int:
        return len(self.ranks) - 1

    @property
    def cables(self) -> list[tuple[int, int]]:
        return [
            (min(a, b), max(a, b))
            for a, b in zip(self.ranks, self.ranks[1:], strict=False)
        ]


def follow(machines: Sequence[Machine], routes: Routes, a: int, b: int) -> Path:
    """The way of packets from rank `a` to rank `b`."""
    target = machines[b].address
    passed = [a]
    if machines[a].host == machines[b].host:
        return Path((a, b))
    while passed[-1] != b:
        here = machines[passed[-1]]
        route = routes[here.rank].get(target)
        if route is None:
            return Path(tuple(passed), "no route")
        if target not in RING_ADDRESSES:
            return Path((a, b))  # how others' networks lead there is not ours
        if here.address in RING_ADDRESSES and not _has(here, route.interface):
            return Path(tuple(passed), "astray")
        after = b if route.gateway is None else _owner(machines, route.gateway)
        if after is None or after in passed:
            return Path(tuple(passed), "astray")
        passed.append(after)
    return Path(tuple(passed))


def _has(machine: Machine, name: str) -> bool:
    """Whether an interface has the machine's address, and so is one of its cables."""
    interface = machine.interface(name)
    return interface is not None and machine.address in interface.addresses


def _owner(machines: Sequence[Machine], address: str) -> int | None:
    return next((it.rank for it in machines if address in it.addresses), None)

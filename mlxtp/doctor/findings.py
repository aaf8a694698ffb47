"""All that is known of a cluster when it is judged, and what a judgement is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.doctor.facts import Interface
from mlxtp.doctor.links import Link
from mlxtp.doctor.machine import Machine
from mlxtp.doctor.paths import Path, Routes, follow
from mlxtp.doctor.speed import Speed

Pair = tuple[int, int]


@dataclass(frozen=True)
class Findings:
    """What ranks have reported and measured; pairs are (lower rank, higher rank).

    `clocks` are seconds ahead of rank 0, `need_bytes` what a rank has to hold.
    """

    machines: Sequence[Machine]
    routes: Routes
    clocks: Sequence[float]
    links: Mapping[Pair, Link]
    speeds: Sequence[Speed]
    transport: str
    need_bytes: float | None = None

    @cached_property
    def hosts(self) -> list[Machine]:
        """One rank's machine for each host."""
        return list({it.host: it for it in reversed(self.machines)}.values())[::-1]

    @cached_property
    def pairs(self) -> list[Pair]:
        return list(combinations(range(len(self.machines)), 2))

    @cached_property
    def paths(self) -> dict[Pair, Path]:
        """From every rank to every other, in both directions."""
        found = {}
        for a, b in self.pairs:
            found[a, b] = follow(self.machines, self.routes, a, b)
            found[b, a] = follow(self.machines, self.routes, b, a)
        return found

    @property
    def all_reached(self) -> bool:
        return all(pair in self.links for pair in self.pairs)

    @property
    def is_ring(self) -> bool:
        """Whether some host has an address in a ring of cables."""
        return any(it.address in RING_ADDRESSES for it in self.machines)

    def port(self, a: int, b: int) -> Interface | None:
        """The interface by which rank `a` reaches rank `b`."""
        route = self.routes[a].get(self.machines[b].address)
        return self.machines[a].interface(route.interface) if route else None

    def at(self, a: int, b: int) -> str:
        """Rank `a`'s host with the port towards `b`, in words."""
        port = self.port(a, b)
        return self.machines[a].host + (f" {port}" if port else "")


@dataclass(frozen=True)
class Fault:
    """Something wrong at a host; `mend` is a command where there is one."""

    where: str
    what: str
    mend: str

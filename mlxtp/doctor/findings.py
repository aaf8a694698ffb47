"""All that is known of a cluster before faults are looked for, and what a fault is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, count

from mlxtp.cluster import cables
from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.comm.arithmetic import Arithmetic
from mlxtp.doctor.facts import Interface
from mlxtp.doctor.links import Link
from mlxtp.doctor.machine import Machine
from mlxtp.doctor.paths import PacketPath, Routes, follow
from mlxtp.doctor.speed import Speed

Pair = tuple[int, int]


@dataclass(frozen=True)
class Findings:
    """What ranks have reported and measured.

    Pairs are (lower rank, higher rank); `links` has those that reach each other.
    `clocks` are seconds ahead of rank 0's. `transport` is what collectives are to be
    measured over, `need_bytes` what a rank has to hold, if that was given.
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
        """The machine of the lowest rank on each host."""
        lowest = {machine.host: machine for machine in reversed(self.machines)}
        return list(lowest.values())[::-1]

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs of ranks."""
        return list(combinations(range(len(self.machines)), 2))

    @cached_property
    def paths(self) -> dict[Pair, PacketPath]:
        """The paths from every rank to every other, in both directions."""
        paths = {}
        for a, b in self.pairs:
            paths[a, b] = follow(self.machines, self.routes, a, b)
            paths[b, a] = follow(self.machines, self.routes, b, a)
        return paths

    def unlike_machines(self) -> str:
        """Say which hosts differ in what MLX computes on, and what follows of it.

        Returns: a line; "" where all are alike.
        """
        hosts: dict[Arithmetic, list[str]] = {}
        for machine in self.machines:
            of_kind = hosts.setdefault(machine.arithmetic, [])
            if machine.host not in of_kind:
                of_kind.append(machine.host)
        if len(hosts) == 1:
            return ""
        shared = set.intersection(*(set(kind.instructions) for kind in hosts))
        kinds = (
            " ".join(
                [*names, "with", str(kind), *sorted({*kind.instructions} - shared)]
            )
            for kind, names in hosts.items()
        )
        return (
            f"Machines differ: {'; '.join(kinds)}. So may the last bits of what they "
            "compute: the sampled token is rank 0's everywhere; of experts that are "
            "nearly tied ranks may choose others: mlxtp.generate --agree-experts"
        )

    @property
    def all_reached(self) -> bool:
        """Whether every rank reaches every other."""
        return all(pair in self.links for pair in self.pairs)

    @property
    def on_cables(self) -> bool:
        """Whether some host has an address on the cables."""
        return any(machine.address in RING_ADDRESSES for machine in self.machines)

    @cached_property
    def cables(self) -> set[Pair]:
        """The pairs of hosts, by their lowest ranks, that a cable with addresses joins.

        Addresses of one end are enough: the other host may have lost its own.
        """
        number = {host.rank: self.number(host) for host in self.hosts}
        return {
            (a, b)
            for a, b in combinations(number, 2)
            if any(
                cables.end(number[x], number[y]).address in self.machines[x].addresses
                for x, y in ((a, b), (b, a))
            )
        }

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each host on the cables.

        A host without an address there takes the lowest number that is free.
        """
        known = {
            host.host: RING_ADDRESSES.index(host.address) + 1
            for host in self.hosts
            if host.address in RING_ADDRESSES
        }
        free = (number for number in count(1) if number not in known.values())
        return {h.host: known.get(h.host) or next(free) for h in self.hosts}

    def number(self, machine: Machine) -> int:
        """Return the number of a host on the cables."""
        return self.numbers[machine.host]

    def port(self, a: int, b: int) -> Interface | None:
        """Return the interface by which rank `a` reaches rank `b`; None without one."""
        route = self.routes[a].get(self.machines[b].address)
        return self.machines[a].interface(route.interface) if route else None

    def at(self, a: int, b: int) -> str:
        """Name rank `a`'s host and its port towards rank `b`."""
        port = self.port(a, b)
        return self.machines[a].host + (f" {port}" if port else "")


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and what fixes it: a command where there is one."""

    where: str
    what: str
    fix: str

"""`--shares auto`: the shares of the ranks that are the fastest that fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import gcd, prod

import mlx.nn as nn

from mlxtp.families.blocks import Heads
from mlxtp.partition.spans import Slice
from mlxtp.plan.hardware import Machine, alike
from mlxtp.plan.opening import Opened
from mlxtp.plan.planning import Plan, Setting, plan
from mlxtp.plan.requirements import Need
from mlxtp.sharding.decide import slice_table

# Shares are tried in steps of this part of an even one.
UNITS = 24
MOVES = (1, 4)
# How many steps are taken from the best start, at most.
STEPS = 24


def auto(opened: Opened, setting: Setting) -> Plan:
    """The plan with the shares that fit and take the least time for a token.

    A rank has one share, for attention, MLP and vocabulary alike: each half of a
    layer ends in a collective for which all wait, so to give a slow machine less
    attention and more of an MLP makes one half slower for what the other gains. Speed
    and memory are aims apart: of two that do not fit, the one that lacks less is
    better; of two that do, the faster; of two as fast, the one with more room.

    Raises: ValueError if the model cannot be split over so many ranks.
    """
    machines = setting.machines
    even = [1] * len(machines)
    first = plan(opened, setting, even)
    if len(machines) == 1 or (alike(machines) and first.fits is not False):
        return first
    search = _Search(opened, setting, first.one)
    by_speed = _in_units([machine.bytes_per_second for machine in machines])
    by_memory = _in_units([m.limit_bytes or m.memory_bytes for m in machines])
    starts = {tuple(it) for it in (_in_units(even), by_speed, by_memory)}
    shares = min(starts, key=search.score)
    for _ in range(STEPS):
        better = min(search.near(shares), key=search.score, default=shares)
        if search.score(better) >= search.score(shares):
            break
        shares = better
    found = plan(opened, setting, _reduced(shares))
    return min(found, first, key=_worth)


def _worth(found: Plan) -> tuple[int, float]:
    """What `found` lacks of memory, and the time of a token."""
    lacks = -min((it for it in found.left_bytes if it is not None), default=0)
    return max(0, lacks), found.decode.seconds


def _in_units(amounts: Sequence[float]) -> tuple[int, ...]:
    units = UNITS * len(amounts)
    return tuple(max(1, round(units * it / sum(amounts))) for it in amounts)


def _reduced(shares: Sequence[int]) -> list[int]:
    by = reduce(gcd, shares)
    return [share // by for share in shares]


@dataclass(frozen=True)
class _Score:
    """In the order of what matters."""

    lacking_bytes: float
    seconds: float
    least_left: float
    slowest: int
    fullest: int


class _Search:
    """Estimates from the whole model's steps and the slices that ranks would have."""

    def __init__(self, opened: Opened, setting: Setting, one: Need) -> None:
        empty = opened.build()
        self._model: nn.Module = empty.model
        self._sizes = {name: it.dtype.size for name, it in empty.sources.items()}
        self._setting = setting
        self._one = one
        self._scores: dict[tuple[int, ...], _Score | None] = {}

    def score(self, shares: tuple[int, ...]) -> tuple[float, float, float]:
        """The less the better."""
        it = self._looked_up(shares)
        if it is None:
            return float("inf"), 0.0, 0.0
        return it.lacking_bytes, it.seconds, -it.least_left

    def near(self, shares: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Units from the slowest or the fullest rank to each other."""
        it = self._looked_up(shares)
        if it is None:
            return []
        source = it.fullest if it.lacking_bytes else it.slowest
        found = []
        for target, units in product(range(len(shares)), MOVES):
            moved = list(shares)
            moved[source] -= units
            moved[target] += units
            if target != source and moved[source] > 0:
                found.append(tuple(moved))
        return found

    def _looked_up(self, shares: tuple[int, ...]) -> _Score | None:
        if shares not in self._scores:
            try:
                self._scores[shares] = self._estimate(shares)
            except ValueError:  # a rank would be left without heads
                self._scores[shares] = None
        return self._scores[shares]

    def _estimate(self, shares: tuple[int, ...]) -> _Score:
        table = slice_table(self._model, shares)
        one, machines = self._one, self._setting.machines
        heads = [s for s in table.blocks if isinstance(s.block.rule, Heads)]
        times, left = [], []
        for rank, machine in enumerate(machines):
            parts, held = self._parts(table.slices(rank))
            times.append(
                [
                    sum(it.read_bytes * _part_of(parts, it.path) for it in step.calls)
                    / machine.bytes_per_second
                    for step in one.rehearsed.token
                ]
            )
            kv = sum(s.parts[rank].size("kv") / s.counts["kv"] for s in heads)
            part = held / one.weights_bytes
            cached = kv / len(heads) if heads else part
            wanted = held + cached * one.cache_bytes + part * one.working_bytes
            left.append(_limit(machine) - wanted)
        seconds = sum(max(step) for step in zip(*times, strict=True))
        totals = [sum(steps) for steps in times]
        return _Score(
            max(0.0, -min(left)),
            seconds,
            min(left),
            totals.index(max(totals)),
            left.index(min(left)),
        )

    def _parts(self, slices: Mapping[str, Slice]) -> tuple[dict[str, float], int]:
        """What a rank has of each module's parameters, and its bytes of all."""
        own: dict[str, int] = {}
        whole: dict[str, int] = {}
        for name, part in slices.items():
            path, size = name.rpartition(".")[0], self._sizes[name]
            own[path] = own.get(path, 0) + size * part.size
            whole[path] = whole.get(path, 0) + size * prod(part.full_shape)
        return {path: own[path] / whole[path] for path in own}, sum(own.values())


def _part_of(parts: Mapping[str, float], path: str) -> float:
    """A layer may be wrapped in one that communicates."""
    around = path.rpartition(".")[0]
    return parts.get(path, parts.get(around, 1.0))


def _limit(machine: Machine) -> float:
    return float("inf") if machine.limit_bytes is None else machine.limit_bytes

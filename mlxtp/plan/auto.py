"""`--shares auto`: of the shares that fit, the fastest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import gcd, prod

import mlx.nn as nn

from mlxtp.dryrun.requirements import Need
from mlxtp.families.blocks import Heads
from mlxtp.partition.spans import Slice
from mlxtp.plan.hardware import Machine, alike
from mlxtp.plan.model import PlannedModel
from mlxtp.plan.planning import Plan, Setting, plan
from mlxtp.sharding.decide import slice_table

# An even share is so many units.
UNITS = 24
# So many units go from one rank to another in a step of the search.
MOVES = (1, 4)
# The search takes at most so many steps.
STEPS = 24


def auto(model: PlannedModel, setting: Setting) -> Plan:
    """Return the plan whose shares fit and take the least time for a token.

    The three parts of a rank's share are equal. Each half of a layer ends in a
    collective in which all ranks wait, so less attention and more of the MLP for a slow
    machine would make one half slower by what the other gains. Of two plans that do
    not fit, the one that lacks less memory is better; of two that fit, the faster one;
    of two that are equally fast, the one that leaves more memory.

    Raises: ValueError if the model cannot be split over so many ranks.
    """
    machines = setting.machines
    even = [1] * len(machines)
    first = plan(model, setting, even)
    if len(machines) == 1 or (alike(machines) and first.fits is not False):
        return first
    search = _Search(model, setting, first.one)
    by_speed = _in_units([machine.bytes_per_second for machine in machines])
    by_memory = _in_units([m.limit_bytes or m.memory_bytes for m in machines])
    starts = {_in_units(even), by_speed, by_memory}
    shares = min(starts, key=search.score)
    for _ in range(STEPS):
        better = min(search.near(shares), key=search.score, default=shares)
        if search.score(better) >= search.score(shares):
            break
        shares = better
    best = plan(model, setting, _reduced(shares))
    return min(best, first, key=lambda plan: (plan.lacking_bytes, plan.decode.seconds))


def _in_units(amounts: Sequence[float]) -> tuple[int, ...]:
    """Shares in units, in proportion to `amounts`."""
    units = UNITS * len(amounts)
    return tuple(max(1, round(units * amount / sum(amounts))) for amount in amounts)


def _reduced(shares: Sequence[int]) -> list[int]:
    """The smallest whole numbers in the same proportion."""
    divisor = reduce(gcd, shares)
    return [share // divisor for share in shares]


@dataclass(frozen=True)
class _Score:
    """What the search knows of some shares.

    `least_left` are the bytes that the fullest rank has left. `slowest` and `fullest`
    are ranks.
    """

    lacking_bytes: float
    seconds: float
    least_left: float
    slowest: int
    fullest: int


class _Search:
    """Estimates plans from the whole model's steps and the slices of each rank."""

    def __init__(self, model: PlannedModel, setting: Setting, one: Need) -> None:
        empty = model.build()
        self._model: nn.Module = empty.model
        self._sizes = {
            name: source.dtype.size for name, source in empty.sources.items()
        }
        self._setting = setting
        self._one = one
        self._scores: dict[tuple[int, ...], _Score | None] = {}

    def score(self, shares: tuple[int, ...]) -> tuple[float, float, float]:
        """Return what to compare, in the order of what matters: less is better."""
        score = self._score(shares)
        if score is None:
            return float("inf"), 0.0, 0.0
        return score.lacking_bytes, score.seconds, -score.least_left

    def near(self, shares: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return shares that move units from the slowest or fullest rank to another."""
        score = self._score(shares)
        if score is None:
            return []
        source = score.fullest if score.lacking_bytes else score.slowest
        neighbours = []
        for target, units in product(range(len(shares)), MOVES):
            moved = list(shares)
            moved[source] -= units
            moved[target] += units
            if target != source and moved[source] > 0:
                neighbours.append(tuple(moved))
        return neighbours

    def _score(self, shares: tuple[int, ...]) -> _Score | None:
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
                    sum(
                        call.read_bytes * _part_of(parts, call.path)
                        for call in step.calls
                    )
                    / machine.bytes_per_second
                    for step in one.dry_run.token
                ]
            )
            kv = sum(s.parts[rank].size("kv") / s.counts["kv"] for s in heads)
            part = held / one.weights_bytes
            cached = kv / len(heads) if heads else part
            needed = held + cached * one.cache_bytes + part * one.working_bytes
            left.append(_limit(machine) - needed)
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
        """The rank's part of each module's parameters, and its bytes of all."""
        own: dict[str, int] = {}
        whole: dict[str, int] = {}
        for name, part in slices.items():
            path, size = name.rpartition(".")[0], self._sizes[name]
            own[path] = own.get(path, 0) + size * part.size
            whole[path] = whole.get(path, 0) + size * prod(part.full_shape)
        return {path: own[path] / whole[path] for path in own}, sum(own.values())


def _part_of(parts: Mapping[str, float], path: str) -> float:
    """The rank's part of a layer, which may lie inside one that communicates."""
    around = path.rpartition(".")[0]
    return parts.get(path, parts.get(around, 1.0))


def _limit(machine: Machine) -> float:
    return float("inf") if machine.limit_bytes is None else machine.limit_bytes

"""Shares that fit: even in time where speed decides, in bytes where memory does.

Estimated from one dry run of the whole model and one of a rank, so that many shares can
be compared. What a rank holds, reads and caches is linear in its part of each kind of
layer; attention alone comes in lumps, so its shares are tried one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, inf
from operator import add, sub
from typing import Protocol

from mlxtp.dryrun.caches import CONTEXT_STEP
from mlxtp.dryrun.requirements import RankNeeds, need
from mlxtp.families.blocks import Heads, Width
from mlxtp.model.skeleton import EmptyModel
from mlxtp.partition.shares import Share, Shares, apportion
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import MatrixShards, SliceTable

# An even share of what is cut finely is so many units.
UNITS = 24
# Query heads are shared out one by one where a token is then so much faster: zeros take
# kernels and, in a prompt, products, and a KV head's cache is on several ranks.
WORTH_QUERIES = 1.02
# The longest context makes a token at most so many times as long as the fastest shares
# would, whatever these need.
MOST_SLOWER = 1.05
# Rates of machines that are alike differ by up to this factor, measured twice.
ALIKE = 1.1
# The part of a host's limit by which a search of what is lacking ends.
CLOSE = 1e-4


class Host(Protocol):
    """The host of a rank: what a model may take of it, and how fast it reads weights.

    Ranks on one host share its limit; None where it is not known.
    """

    @property
    def host(self) -> str: ...  # noqa: D102
    @property
    def limit_bytes(self) -> int | None: ...  # noqa: D102
    @property
    def bytes_per_second(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Fit:
    """Shares, and what is estimated of them.

    `lacking_bytes` is what the fullest rank lacks, `least_left` what it has left.
    `reading_seconds` is the time in which a token's weights and caches are read,
    `other_seconds` what the rest of it takes.
    """

    shares: Shares
    lacking_bytes: float
    reading_seconds: float
    other_seconds: float
    least_left: float

    @property
    def order(self) -> tuple[float, float, float]:
        """What to compare, in the order of what matters: less is better."""
        worth = WORTH_QUERIES if self.shares[0].by_query else 1.0
        seconds = self.reading_seconds + self.other_seconds
        return self.lacking_bytes, worth * seconds, -self.least_left


@dataclass(frozen=True)
class _Attention:
    """Some shares of attention: what each rank then has whatever the other shares.

    `parts` and `kv` are parts of the whole model's attention and KV heads, where a KV
    head counts for each rank that holds it. `held_bytes` are those of attention and of
    what is not cut.
    """

    shares: Shares
    held_bytes: tuple[int, ...]
    parts: tuple[float, ...]
    kv: tuple[float, ...]


class Fitting:
    """A model, the hosts of its ranks, and the shares that suit them.

    Args:
        build: makes the model without weights, a new one in each call.
        hosts: one for each rank.
        context: tokens in the caches, about which caches are estimated.
        batch: sequences at once.
        is_fused: attention is one kernel, as on a GPU.
        collective_seconds: what a collective takes, with all that is done before it
            but reading.

    Raises: ValueError if the model cannot be split over so many ranks.
    """

    def __init__(
        self,
        build: Callable[[], EmptyModel],
        hosts: Sequence[Host],
        context: int,
        batch: int = 1,
        *,
        is_fused: bool = True,
        collective_seconds: float = 0.0,
    ) -> None:
        self._model = build().model
        self._ranks = len(hosts)
        self._rates = [host.bytes_per_second for host in hosts]
        if max(self._rates) <= ALIKE * min(self._rates):
            self._rates = [sum(self._rates) / len(hosts)] * len(hosts)
        self._hosts = [host.host for host in hosts]
        self._limits = [
            inf
            if host.limit_bytes is None
            else host.limit_bytes / self._hosts.count(host.host)
            for host in hosts
        ]
        self._reserve = [0.0] * self._ranks
        self._tables: dict[Shares, _Attention | None] = {}
        self._whole = slice_table(self._model, [1])
        even = slice_table(self._model, [1] * self._ranks)

        half = max(1, context // 2)
        whole = RankNeeds(build(), self._whole, 0, batch, is_fused=is_fused)
        before, one = whole.at(half), whole.at(context)
        of_rank = need(build(), even, 0, context, batch, is_fused=is_fused)
        part = _kv_parts(even)[0]
        self._working = of_rank.working_bytes
        slope = (one.cache_bytes - before.cache_bytes) / max(1, context - half)
        self._cache = one.cache_bytes - slope * context, slope
        # The part of caches that grows with a rank's KV heads; the rest all ranks have.
        self._by_kv = 0.0
        if one.cache_bytes and part < 1:
            self._by_kv = (1 - of_rank.cache_bytes / one.cache_bytes) / (1 - part)
        self._read = dict.fromkeys(("", "attention", "mlp", "vocabulary"), 0.0)
        for step in one.dry_run.token:
            for call in step.calls:
                kind = _kind(self._whole.matrix_of(call.path))
                self._read[kind] += call.read_bytes
        collectives = sum(bool(step.kind) for step in of_rank.dry_run.token)
        self._other_seconds = collective_seconds * collectives
        self._held = _held(self._whole, 0)
        self._units, self._rows = _mlp_units(even), UNITS * self._ranks
        self._heads = _largest_heads(even)

    def reserve(self, of_ranks: Sequence[float]) -> None:
        """Leave so many bytes more on each rank: the estimate was off by them."""
        self._reserve = [*map(add, self._reserve, of_ranks)]

    def best(self, context: int) -> Fit:
        """Return the shares that suit a context.

        Of shares that fit, the fastest; of those equally fast, what leaves more memory;
        of shares that do not fit, what lacks less.
        """
        return self._best(context, tuple(map(sub, self._limits, self._reserve)))

    def suited(self, context: int) -> Shares:
        """Return the shares for a context, or for the longest below it that fits."""
        fit = self.best(context)
        if fit.lacking_bytes:
            fit = self.best(self.longest(context) or CONTEXT_STEP)
        return fit.shares

    def longest(self, most: int) -> int:
        """Return the longest context, up to `most` tokens, that fits some shares.

        A token then takes at most MOST_SLOWER of what the fastest shares would take. 0
        where no context fits.
        """

        def fits(steps: int) -> bool:
            context = min(most, steps * CONTEXT_STEP)
            fit, free = self.best(context), self._best(context, (inf,) * self._ranks)
            other = self._other_seconds
            return not fit.lacking_bytes and fit.reading_seconds + other <= (
                MOST_SLOWER * (free.reading_seconds + other)
            )

        low, high = 0, -(-most // CONTEXT_STEP) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return min(most, low * CONTEXT_STEP)

    def _best(self, context: int, limits: tuple[float, ...]) -> Fit:
        fits = (
            self._fit(attention, context, limits)
            for shares in dict.fromkeys(self._candidates(context, limits))
            if (attention := self._attention(shares)) is not None
        )
        return min(fits, key=lambda fit: fit.order)

    def _candidates(self, context: int, limits: Sequence[float]) -> Iterator[Shares]:
        """Shares of attention to try, the plainest first."""
        ranks, even = self._ranks, [1.0] * self._ranks
        queries, kv, is_by_query = self._heads
        # All kinds of layers together, as if they could be cut anywhere.
        whole = sum(self._held.values()) + self._caches(context)
        uncut = self._held[""] + self._working + self._caches(context, 0.0)
        rooms = [max(limit - uncut, 0.0) / whole for limit in limits]
        weights = [even, self._rates, _fill_up(self._rates, rooms) or even]
        if inf not in limits:
            weights.append([max(limit, 1.0) for limit in limits])
        units = kv if kv >= ranks else UNITS * ranks
        for each in weights:
            yield self._shares(_plain(_apportioned(units, each), units))
        if not is_by_query or queries < ranks:
            return
        for each in weights:
            yield self._shares(_apportioned(queries, each), by_query=True)
        head = self._held["attention"] / (queries + kv)
        cached = self._by_kv * self._caches(context) / kv
        counts = _even_in_cost(queries, queries // kv, self._rates, head, head + cached)
        yield self._shares(counts, by_query=True)

    def _shares(self, attention: Sequence[int], *, by_query: bool = False) -> Shares:
        return Shares(Share(number, 1, 1, by_query) for number in attention)

    def _attention(self, shares: Shares) -> _Attention | None:
        """What ranks have with these shares of attention; None if there is no such."""
        if shares not in self._tables:
            try:
                table = slice_table(self._model, shares)
            except ValueError:  # a rank would be left without heads
                self._tables[shares] = None
            else:
                held = [_held(table, rank) for rank in range(self._ranks)]
                whole = self._held["attention"] or 1
                self._tables[shares] = _Attention(
                    shares,
                    tuple(of_rank[""] + of_rank["attention"] for of_rank in held),
                    tuple(of_rank["attention"] / whole for of_rank in held),
                    tuple(_kv_parts(table)),
                )
        return self._tables[shares]

    def _caches(self, context: int, kv: float = 1.0) -> float:
        """Bytes of caches on a rank with a part of the KV heads."""
        fixed, slope = self._cache
        return (fixed + slope * context) * (1 - self._by_kv + self._by_kv * kv)

    def _fit(self, attention: _Attention, context: int, limits: Sequence[float]) -> Fit:
        """Share out the MLP and the vocabulary beside some shares of attention."""
        caches = [self._caches(context, kv) for kv in attention.kv]
        rooms = [
            limit - held - cached - self._working
            for limit, held, cached in zip(
                limits, attention.held_bytes, caches, strict=True
            )
        ]
        rooms = self._pooled(rooms)
        lacking = 0.0
        parts = self._parts(rooms)
        if parts is None:
            low, high = 0.0, sum(self._held.values()) + max(0.0, -min(rooms))
            while high - low > CLOSE * high:
                middle = (low + high) / 2
                is_enough = self._parts([room + middle for room in rooms])
                low, high = (low, middle) if is_enough else (middle, high)
            lacking = high
            parts = self._parts([room + lacking for room in rooms])
            assert parts is not None
        mlp, vocabulary = parts
        numbers = zip(
            attention.shares,
            _plain(_apportioned(self._units, mlp), self._units),
            _plain(_apportioned(self._rows, vocabulary), self._rows),
            strict=True,
        )
        left = min(
            room - self._held["mlp"] * m - self._held["vocabulary"] * v
            for room, m, v in zip(rooms, mlp, vocabulary, strict=True)
        )
        # Each ends in a collective, in which all wait for the slowest.
        steps = [
            [self._read[""]] * self._ranks,
            [self._read["attention"] * part for part in attention.parts],
            [self._read["mlp"] * part for part in mlp],
            [self._read["vocabulary"] * part for part in vocabulary],
            caches,
        ]
        seconds = sum(
            max(nbytes / rate for nbytes, rate in zip(step, self._rates, strict=True))
            for step in steps
        )
        shares = Shares(Share(a.attention, m, v, a.by_query) for a, m, v in numbers)
        return Fit(shares, lacking, seconds, self._other_seconds, left)

    def _pooled(self, rooms: Sequence[float]) -> list[float]:
        """Give ranks on one host the same part of what is left there."""
        of_host: dict[str, list[float]] = {}
        for host, room in zip(self._hosts, rooms, strict=True):
            of_host.setdefault(host, []).append(room)
        return [sum(of_host[host]) / len(of_host[host]) for host in self._hosts]

    def _parts(self, rooms: Sequence[float]) -> tuple[list[float], list[float]] | None:
        """Each rank's part of the MLP and of the vocabulary; None if rooms are too few.

        As the ranks read, as far as the rooms allow.
        """
        mlp, vocabulary = self._held["mlp"], self._held["vocabulary"]
        least_mlp, least_rows = mlp / self._units, vocabulary / self._rows
        if min(rooms) < least_mlp + least_rows:
            return None
        of_vocabulary = _fill_up(
            self._rates, [(room - least_mlp) / max(vocabulary, 1) for room in rooms]
        )
        if of_vocabulary is None:
            return None
        of_mlp = _fill_up(
            self._rates,
            [
                (room - vocabulary * part) / max(mlp, 1)
                for room, part in zip(rooms, of_vocabulary, strict=True)
            ],
        )
        return None if of_mlp is None else (of_mlp, of_vocabulary)


def _kind(matrix: MatrixShards | None) -> str:
    """Which part of a share counts for a matrix; "" for what is not cut."""
    if matrix is None:
        return ""
    rule = matrix.block.block.rule
    if isinstance(rule, Width):
        return rule.share
    return "attention" if isinstance(rule, Heads) else "vocabulary"


def _held(table: SliceTable, rank: int) -> dict[str, int]:
    """The bytes that a rank holds, by kind."""
    result = dict.fromkeys(("", "attention", "mlp", "vocabulary"), 0)
    for name, nbytes in table.nbytes(rank).items():
        result[_kind(table.matrix_of(name))] += nbytes
    return result


def _kv_parts(table: SliceTable) -> list[float]:
    """The part of all KV heads that each rank holds, over all layers.

    A state space caches by its heads: what they share a group of is small.
    """
    units = [
        (s, "q" if s.block.rule.states else "kv")
        for s in table.blocks
        if isinstance(s.block.rule, Heads)
    ]
    return [
        sum(s.parts[rank].size(unit) / s.counts[unit] for s, unit in units)
        / max(len(units), 1)
        for rank in range(table.ranks)
    ]


def _largest_heads(table: SliceTable) -> tuple[int, int, bool]:
    """The most query heads of a layer, its KV heads, and if queries go one by one.

    Layers whose queries do come first, before a state space with more heads. Where
    there is a KV head for each query head, whole groups are single ones anyway.
    """
    heads = (
        (s.block.rule.by_query and q > kv, q, kv)
        for s in table.blocks
        if isinstance(s.block.rule, Heads)
        for q, kv in [(s.counts["q"], s.counts["kv"])]
    )
    is_by_query, queries, kv = max(heads, default=(False, 1, 1))
    return queries, kv, is_by_query


def _mlp_units(table: SliceTable) -> int:
    """In how many pieces the widest MLP is cut: quantization groups, or finer ones."""
    widths = {
        s.counts["w"]: [edge for part in s.parts for edge in part.spans["w"][0]]
        for s in table.blocks
        if isinstance(s.block.rule, Width) and s.block.rule.share == "mlp"
    }
    if not widths:
        return UNITS * table.ranks
    width = max(widths)
    return max(width // gcd(width, *widths[width]), UNITS * table.ranks)


def _fill_up(weights: Sequence[float], most: Sequence[float]) -> list[float] | None:
    """Divide 1 in proportion to `weights`, but nobody gets more than its `most`.

    What some cannot take goes to the others. None if all together cannot take it.
    """
    if min(most) < 0 or sum(most) < 1:
        return None
    result = list(most)
    rest, able = 1.0, set(range(len(weights)))
    while able:
        each = rest / sum(weights[i] for i in able)
        full = {i for i in able if most[i] < each * weights[i]}
        if not full:
            for i in able:
                result[i] = each * weights[i]
            break
        rest -= sum(most[i] for i in full)
        able -= full
    return result


def _apportioned(total: int, parts: Sequence[float]) -> list[int]:
    """Divide `total` things in proportion to numbers; nobody goes without."""
    scale = 10**9 / max(parts)
    return apportion(total, [max(1, round(scale * part)) for part in parts], 1)


def _plain(counts: Sequence[int], total: int) -> list[int]:
    """The smallest whole numbers that apportion `total` things so."""
    if list(counts) == apportion(total, [1] * len(counts), 1):
        return [1] * len(counts)
    divisor = gcd(*counts)
    return [count // divisor for count in counts]


def _even_in_cost(
    queries: int, group: int, rates: Sequence[float], per_query: float, per_kv: float
) -> list[int]:
    """Query heads of each rank, side by side, so that all take about the same time.

    A rank takes `per_query` for each of them and `per_kv` for each KV head above them,
    over its rate.
    """

    def dealt(seconds: float) -> list[int]:
        counts: list[int] = []
        for number, rate in enumerate(rates):
            start, most = sum(counts), queries - sum(counts) - (len(rates) - number - 1)
            count = 1
            while count < most and seconds * rate >= (
                per_query * (count + 1)
                + per_kv * (-(-(start + count + 1) // group) - start // group)
            ):
                count += 1
            counts.append(count)
        return counts

    low, high = 0.0, (per_query + per_kv) * queries / min(rates)
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if sum(dealt(middle)) == queries else (middle, high)
    return dealt(high)

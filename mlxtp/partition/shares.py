"""What each rank gets of a model, in proportion to what the others get.

Integers only. A rule that cuts an axis is given one positive number a rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Self

from mlxtp.partition.spans import Span

# What a share is told for, and how the command line calls it. "queries" is attention
# too, where query heads are shared out one by one.
KINDS = ("attention", "mlp", "vocabulary")
QUERIES = "queries"


@dataclass(frozen=True)
class Share:
    """A rank's share of a model, one positive number for each kind of layer.

    The numbers count in proportion to those of the other ranks.

    Args:
        by_query: `attention` shares query heads out one by one, and ranks hold the same
            KV head where it is cut; else whole groups, a KV head with all query heads
            under it, as far as there are enough. It is the same for all ranks.
    """

    attention: int
    mlp: int
    vocabulary: int
    by_query: bool = False

    @classmethod
    def even(cls, parts: int) -> "Share":
        """The same share of all kinds of layers."""
        return cls(parts, parts, parts)

    def __str__(self) -> str:
        """Write it in short: 2, 2/3/1, q26/3/1 by query heads."""
        parts = self.attention, self.mlp, self.vocabulary
        if self.by_query:
            return f"q{'/'.join(map(str, parts))}"
        return str(parts[0]) if len(set(parts)) == 1 else "/".join(map(str, parts))


class Shares(tuple[Share, ...]):
    """The shares of all ranks. As text they are what the command line takes."""

    __slots__ = ()

    def __new__(cls, given: Iterable[int | Share]) -> Self:
        """Take one number or share a rank.

        Raises: ValueError for what is not positive.
        """
        shares = [s if isinstance(s, Share) else Share.even(s) for s in given]
        numbers = [n for s in shares for n in (s.attention, s.mlp, s.vocabulary)]
        if min(numbers, default=0) < 1:
            words = ",".join(map(str, shares))
            raise ValueError(f"shares {words}: wanted one positive whole number a rank")
        if len({share.by_query for share in shares}) > 1:
            raise ValueError("shares by query heads: all ranks have them so, or none")
        return super().__new__(cls, shares)

    @classmethod
    def of_kinds(cls, kinds: Mapping[str, Sequence[int]]) -> Self:
        """Take the numbers of all ranks for some kinds of layers; others are even.

        Raises: ValueError for what is not positive, an unknown kind, attention told in
            two ways, or kinds that tell of more ranks than others.
        """
        by_query = QUERIES in kinds
        numbers = dict(kinds)
        if by_query and "attention" in kinds:
            raise ValueError("attention and queries both share out attention: give one")
        if by_query:
            numbers["attention"] = numbers.pop(QUERIES)
        if unknown := numbers.keys() - set(KINDS):
            raise ValueError(
                f"{min(unknown)!r} is none of {', '.join((*KINDS, QUERIES))}"
            )
        ranks = {len(of_ranks) for of_ranks in numbers.values()}
        if len(ranks) != 1:
            raise ValueError("wanted as many numbers for one kind as for the other")
        even = [1] * ranks.pop()
        by_rank = zip(*(numbers.get(kind, even) for kind in KINDS), strict=True)
        return cls(
            Share(attention, mlp, vocabulary, by_query)
            for attention, mlp, vocabulary in by_rank
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what the command line gives: 2,1,1 or attention=2,1,1/mlp=1,1,2.

        Raises: ValueError for anything else.
        """
        kinds = {}
        for part in text.split("/"):
            kind, equals, numbers = part.rpartition("=")
            if equals and not kind.strip():
                raise ValueError(f"wanted a name before {part.strip()!r}")
            if kind.strip() in kinds:
                raise ValueError(f"{kind.strip()!r} is given twice")
            words = [word.strip() for word in numbers.split(",")]
            kinds[kind.strip()] = [int(w) if w.isdecimal() else 0 for w in words]
        if "" not in kinds:
            return cls.of_kinds(kinds)
        if len(kinds) > 1:
            raise ValueError("wanted a name before each kind's numbers")
        return cls(kinds[""])

    def __str__(self) -> str:
        """Write them as `parse` reads them."""
        if not any("/" in str(share) for share in self):
            return ",".join(map(str, self))
        by_query = self[0].by_query
        return "/".join(
            f"{QUERIES if by_query and kind == 'attention' else kind}={numbers}"
            for kind in KINDS
            for numbers in [",".join(str(getattr(share, kind)) for share in self)]
        )


def apportion(total: int, shares: Sequence[int], minimum: int = 0) -> list[int]:
    """Divide `total` indivisible things in proportion to `shares`.

    Largest remainders, ties to the lower rank; with equal shares no two counts differ
    by more than one. Nobody gets less than `minimum`.

    Raises: ValueError if `total` is less than `minimum` for every rank.
    """
    ranks = len(shares)
    if total < minimum * ranks:
        raise ValueError(f"{total} cannot be shared by {ranks} ranks")
    quotas = [Fraction(total * share, sum(shares)) for share in shares]
    result = [max(minimum, int(quota)) for quota in quotas]
    while (missing := total - sum(result)) != 0:
        step = 1 if missing > 0 else -1
        able = [r for r in range(ranks) if step > 0 or result[r] > minimum]
        neediest = max(able, key=lambda r: (step * (quotas[r] - result[r]), -r))
        result[neediest] += step
    return result


def cut_axis(
    length: int, shares: Sequence[int], granule: int = 1, minimum: int = 0
) -> list[Span]:
    """Cut an axis into one contiguous span a rank.

    Cuts fall on multiples of `granule`, which must divide `length`; `minimum` is in
    granules.

    Raises: ValueError if it does not, or there are too few granules for `minimum`.
    """
    if length % granule:
        raise ValueError(f"{length} is no multiple of {granule}")
    stops = [0]
    for count in apportion(length // granule, shares, minimum):
        stops.append(stops[-1] + count * granule)
    return [Span(start, stop) for start, stop in pairwise(stops)]

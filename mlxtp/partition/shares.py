"""What each rank gets of a model, in proportion to what the others get.

Integers only. A rule that cuts an axis is given one positive number a rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from mlxtp.partition.spans import Span


@dataclass(frozen=True)
class Share:
    """A rank's share of a model, one positive number for each kind of layer.

    The numbers count in proportion to those of the other ranks.
    """

    attention: int
    mlp: int
    vocabulary: int

    @classmethod
    def even(cls, parts: int) -> "Share":
        """The same share of all kinds of layers."""
        return cls(parts, parts, parts)

    def __str__(self) -> str:
        """Write it as the command line takes it."""
        parts = (self.attention, self.mlp, self.vocabulary)
        return str(parts[0]) if len(set(parts)) == 1 else "/".join(map(str, parts))


Shares = tuple[Share, ...]


def as_shares(given: Iterable[int | Share]) -> Shares:
    """Turn one number or share a rank into shares.

    Raises: ValueError for what is not positive.
    """
    shares = tuple(
        share if isinstance(share, Share) else Share.even(share) for share in given
    )
    if not shares or min(min(s.attention, s.mlp, s.vocabulary) for s in shares) < 1:
        numbers = ",".join(map(str, shares))
        raise ValueError(f"shares {numbers}: wanted one positive whole number a rank")
    return shares


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

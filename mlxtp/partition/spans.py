"""Which part of an axis a rank owns. Integers only.

A *span* is a half-open range (start, stop). A rule is given the weights of all
ranks, positive numbers in whose proportion the axis is shared out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import prod

Span = tuple[int, int]
Spans = tuple[Span, ...]


def shares(total: int, weights: Sequence[int], minimum: int = 0) -> list[int]:
    """Share out `total` indivisible things in proportion to `weights`.

    Largest remainders, ties to the lower rank; with equal weights no two shares
    differ by more than one. Nobody gets less than `minimum`.

    Raises: ValueError if `total` is less than `minimum` for every rank.
    """
    ranks = len(weights)
    if total < minimum * ranks:
        raise ValueError(f"{total} cannot be shared by {ranks} ranks")
    quotas = [Fraction(total * weight, sum(weights)) for weight in weights]
    result = [max(minimum, int(quota)) for quota in quotas]
    while (missing := total - sum(result)) != 0:
        step = 1 if missing > 0 else -1
        able = [r for r in range(ranks) if step > 0 or result[r] > minimum]
        neediest = max(able, key=lambda r: (step * (quotas[r] - result[r]), -r))
        result[neediest] += step
    return result


def spans(
    total: int, weights: Sequence[int], granule: int = 1, minimum: int = 0
) -> list[Span]:
    """Cut an axis of length `total` into one contiguous span for each rank.

    Cuts fall on multiples of `granule`, which must divide `total`; `minimum` is
    in granules.
    """
    if total % granule:
        raise ValueError(f"{total} is no multiple of {granule}")
    stops = [0]
    for share in shares(total // granule, weights, minimum):
        stops.append(stops[-1] + share * granule)
    return list(pairwise(stops))


def cover(needed: Sequence[Span], granule: int) -> Spans:
    """The fewest whole granules that contain the `needed` spans, merged."""
    result: list[Span] = []
    for start, stop in sorted(needed):
        start, stop = start // granule * granule, -(-stop // granule) * granule
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def keeps_whole(parts: Sequence[Spans], size: int) -> bool:
    """Whether every rank has whole groups of `size` alone, however many."""
    return all(cover(spans, size) == cover(spans, 1) for spans in parts)


def length(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def times(spans: Sequence[Span], item: int) -> Spans:
    """The same of an axis on which each has become `item` others."""
    return tuple((a * item, b * item) for a, b in spans if a < b)


def without(spans: Sequence[Span], held: Sequence[Span]) -> Spans:
    """What of `spans` is not in `held`, in the order of `spans`."""
    result: list[Span] = []
    for start, stop in spans:
        for first, last in cover(held, 1):
            if last <= start or first >= stop:
                continue
            if start < first:
                result.append((start, first))
            start = last
        if start < stop:
            result.append((start, stop))
    return tuple(result)


@dataclass(frozen=True)
class Slice:
    """A part of an array: of its axis `axis` the `spans`, joined.

    `axis` counts from the first; None stands for the whole array.
    """

    full_shape: tuple[int, ...]
    axis: int | None = None
    spans: Spans = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return self.full_shape
        before, after = self.full_shape[: self.axis], self.full_shape[self.axis + 1 :]
        return (*before, length(self.spans), *after)

    @property
    def size(self) -> int:
        return prod(self.shape)


def spans_on(part: Slice, axis: int) -> Spans:
    """What a slice has of `axis`: all of it, unless it is cut there."""
    if part.axis == axis:
        return part.spans
    return ((0, part.full_shape[axis] if part.full_shape else 1),)


def union(one: Slice, other: Slice) -> Slice:
    """What two slices of an array have together: all of it if cut on other axes."""
    if one.axis is None or one.axis != other.axis:
        return Slice(one.full_shape)
    return Slice(one.full_shape, one.axis, cover((*one.spans, *other.spans), 1))

"""Spans of an axis, and slices of an array: integers only.

A span is a half-open range of places on an axis. `Spans` are several of one axis, in
the order in which they are joined. Both are tuples: they compare, unpack and turn into
JSON as such.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple, Self


class Span(NamedTuple):
    """The places from `start` up to `stop`, which is not one of them."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """The number of places."""
        return self.stop - self.start

    @property
    def indices(self) -> range:
        """The places, ascending."""
        return range(self.start, self.stop)

    def intersection(self, other: "Span") -> "Span":
        """The places of both; of length 0 where there are none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def shifted(self, by: int) -> "Span":
        """The span `by` places further on."""
        return Span(self.start + by, self.stop + by)


class Spans(tuple[Span, ...]):
    """Spans of one axis, joined in this order."""

    __slots__ = ()

    def __new__(cls, spans: Iterable[tuple[int, int]] = ()) -> Self:
        """Take pairs of (start, stop)."""
        return super().__new__(cls, (Span(*span) for span in spans))

    @classmethod
    def whole(cls, length: int) -> Self:
        """All of an axis."""
        return cls([(0, length)])

    @property
    def length(self) -> int:
        """The number of places in all spans."""
        return sum(span.length for span in self)

    @property
    def indices(self) -> list[int]:
        """All places, in the order in which they are joined."""
        return [place for span in self for place in span.indices]

    @property
    def is_ascending(self) -> bool:
        """Whether every span begins behind the one before it."""
        return all(a.stop <= b.start for a, b in pairwise(self))

    @property
    def offsets(self) -> dict[int, int]:
        """Where each place is once the spans are joined."""
        return {place: offset for offset, place in enumerate(self.indices)}

    def offset(self, place: int) -> int:
        """Where `place` is once the spans are joined.

        Raises: ValueError if no span holds it.
        """
        before = 0
        for span in self:
            if span.start <= place < span.stop:
                return before + place - span.start
            before += span.length
        raise ValueError(f"{place} is in none of {list(map(tuple, self))}")

    def aligned(self, granule: int) -> "Spans":
        """The fewest whole granules that hold these places: ascending, merged."""
        merged: list[Span] = []
        for start, stop in sorted(self):
            start, stop = start // granule * granule, -(-stop // granule) * granule
            if merged and start <= merged[-1].stop:
                merged[-1] = Span(merged[-1].start, max(stop, merged[-1].stop))
            else:
                merged.append(Span(start, stop))
        return Spans(merged)

    def merged(self) -> "Spans":
        """The same places, ascending, in as few spans as hold them."""
        return self.aligned(1)

    def joined(self) -> "Spans":
        """The same places in the same order, in as few spans as that takes."""
        result: list[Span] = []
        for span in self:
            if result and result[-1].stop == span.start:
                result[-1] = Span(result[-1].start, span.stop)
            elif span.length:
                result.append(span)
        return Spans(result)

    def intersection(self, other: Iterable[tuple[int, int]]) -> "Spans":
        """The places that `other` has too, in the order of these spans."""
        held = Spans(other).merged()
        both = (span.intersection(part) for span in self for part in held)
        return Spans(span for span in both if span.length)

    def difference(self, other: Iterable[tuple[int, int]]) -> "Spans":
        """The places that `other` has not, in the order of these spans."""
        held = Spans(other).merged()
        result: list[Span] = []
        for start, stop in self:
            for first, last in held:
                if last <= start or first >= stop:
                    continue
                if start < first:
                    result.append(Span(start, first))
                start = last
            if start < stop:
                result.append(Span(start, stop))
        return Spans(result)

    def scaled(self, factor: int) -> "Spans":
        """The same on an axis where each place has become `factor` others."""
        return Spans((a * factor, b * factor) for a, b in self if a < b)

    def shifted(self, by: int) -> "Spans":
        """The same spans, `by` places further on."""
        return Spans(span.shifted(by) for span in self)


def keeps_groups_whole(parts: Iterable[Spans], size: int) -> bool:
    """Whether every rank has whole groups of `size` alone, however many."""
    return all(spans.aligned(size) == spans.merged() for spans in parts)


@dataclass(frozen=True)
class Slice:
    """A part of an array: of its axis `axis` the `spans`, joined.

    `axis` counts from the first; None stands for the whole array.
    """

    full_shape: tuple[int, ...]
    axis: int | None = None
    spans: Spans = Spans()  # noqa: RUF009  (immutable)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        if self.axis is None:
            return self.full_shape
        before, after = self.full_shape[: self.axis], self.full_shape[self.axis + 1 :]
        return (*before, self.spans.length, *after)

    @property
    def size(self) -> int:
        """The number of elements of the part."""
        return prod(self.shape)

    def on(self, axis: int) -> Spans:
        """The spans of `axis` that it has: all of it, unless it is cut there."""
        if self.axis == axis:
            return self.spans
        return Spans.whole(self.full_shape[axis] if self.full_shape else 1)

    def union(self, other: "Slice") -> "Slice":
        """Both together: the whole array if they are cut on different axes."""
        if self.axis is None or self.axis != other.axis:
            return Slice(self.full_shape)
        both = Spans([*self.spans, *other.spans]).merged()
        return Slice(self.full_shape, self.axis, both)

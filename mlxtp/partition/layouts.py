"""The layout of an axis: which heads, columns or rows lie where on it. Integers only.

A layout is a line of terms, in the order in which they lie on the axis. A term is a
kind of unit: `q` are all query heads, `kv` all KV heads (or groups of a state space),
`w` the columns of an MLP, `v` the rows of a vocabulary.

    "q kv kv"               all queries, then all keys, then all values
    "(q kv kv)"             for each KV head: the queries under it, its key, its value
    "q:head_dim q:1"        each query head has `head_dim` features, then one feature

After the colon stands how many features a unit has: a number, or an attribute of the
module. Units of terms without a colon all have the same number of features.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from mlxtp.partition.spans import Span, Spans


@dataclass(frozen=True)
class Part:
    """What one rank computes of a block: spans of units, by unit.

    `groups` are its KV heads, each with the query heads that it computes under it.
    Grouped-query attention takes a rectangle, equally many query heads under each KV
    head. Where the first or the last KV head has fewer, zeros stand for what is missing
    there: before the first query head, or behind the last.
    """

    spans: Mapping[str, Spans]
    groups: tuple[tuple[int, Span], ...] = ()

    def size(self, unit: str) -> int:
        """The number of units of a kind that the rank has."""
        return self.spans[unit].length

    def slots(self, unit: str) -> int:
        """The number of units that the rank computes with, zeros among them."""
        return self.size(unit) + (sum(self.zeros) if unit == "q" else 0)

    @property
    def zeros(self) -> tuple[int, int]:
        """How many query heads of zeros stand before the rank's, and behind them."""
        if not self.groups:
            return 0, 0
        lengths = [heads.length for _, heads in self.groups]
        return max(lengths) - lengths[0], max(lengths) - lengths[-1]


@dataclass(frozen=True)
class Term:
    """A kind of unit on an axis, and how many features one unit has.

    `width` is a number or an attribute's name; "" for the width that all such terms
    share.
    """

    unit: str
    width: str


# Zeros among a rank's features, as its attention takes them: so many zeros and so many
# features behind them, again and again. Empty where there are no zeros.
Fill = tuple[tuple[int, int], ...]
# A term alone, or the terms in parentheses, which come once for every KV head.
Group = tuple[Term, ...]


@lru_cache
def parse(layout: str) -> tuple[Group, ...]:
    """Parse a layout into groups of terms."""
    return tuple(
        tuple(
            Term(unit, width)
            for unit, _, width in (term.partition(":") for term in group.split())
        )
        for group in (
            text.strip("()") for text in re.findall(r"\([^()]+\)|[^\s()]+", layout)
        )
    )


def place(
    layout: str,
    features: int,
    counts: Mapping[str, int],
    part: Part,
    width_of: Callable[[str], int],
) -> Spans:
    """Find the spans of a rank's `part` on an axis of `features` with this layout.

    `counts` are the units of the whole block; `width_of` gives the value of an
    attribute of the module, for widths by name.

    Raises: ValueError if the axis cannot be of this layout.
    """
    groups, width = _widths(layout, features, counts, width_of)
    spans: list[Span] = []
    start = 0
    for group in groups:
        if len(group) == 1:
            (term,) = group
            spans += part.spans[term.unit].scaled(width(term)).shifted(start)
        else:
            spans += _by_kv_head(group, start, counts, part, width)
        start += sum(counts[term.unit] * width(term) for term in group)
    return Spans(spans).joined()


def fill(
    layout: str,
    features: int,
    counts: Mapping[str, int],
    part: Part,
    width_of: Callable[[str], int],
) -> Fill:
    """Say where zeros stand among the features that `place` finds for a `part`.

    Arguments and errors are those of `place`; empty where there are none.
    """
    if not any(part.zeros):
        return ()
    groups, width = _widths(layout, features, counts, width_of)
    before, behind = part.zeros
    runs: list[tuple[int, int]] = []
    for group in groups:
        alone = len(group) == 1
        turns = [(part.size("q"), before, behind)]
        if not alone:
            first, last = part.groups[0][0], part.groups[-1][0]
            turns = [
                (heads.length, before * (kv == first), behind * (kv == last))
                for kv, heads in part.groups
            ]
        for queries, zeros, more in turns:
            for term in group:
                if term.unit == "q":
                    runs.append((zeros * width(term), queries * width(term)))
                    runs.append((more * width(term), 0))
                else:
                    size = part.size(term.unit) if alone else 1
                    runs.append((0, size * width(term)))
    joined = [(0, 0)]
    for zeros, length in runs:
        if not zeros or not joined[-1][1]:
            last_zeros, last_length = joined.pop()
            joined.append((last_zeros + zeros, last_length + length))
        else:
            joined.append((zeros, length))
    return tuple(joined) if any(zeros for zeros, _ in joined) else ()


def _widths(
    layout: str,
    features: int,
    counts: Mapping[str, int],
    width_of: Callable[[str], int],
) -> tuple[tuple[Group, ...], Callable[[Term], int]]:
    """The groups of terms of an axis, and how many features a unit of a term has.

    Raises: ValueError if the axis cannot be of this layout.
    """
    groups = parse(layout)
    terms = [term for group in groups for term in group]
    given = {
        term: int(term.width) if term.width.isdigit() else width_of(term.width)
        for term in terms
        if term.width
    }
    rest = features - sum(counts[t.unit] * given[t] for t in terms if t in given)
    units = sum(counts[t.unit] for t in terms if t not in given)
    common, odd = divmod(rest, units) if units else (0, rest)
    if odd or rest < 0:
        raise ValueError(f"an axis of {features} features is not laid out as {layout}")

    def width(term: Term) -> int:
        return given.get(term, common)

    return groups, width


def _by_kv_head(
    group: Group,
    start: int,
    counts: Mapping[str, int],
    part: Part,
    width: Callable[[Term], int],
) -> list[Span]:
    """The spans of terms that come once for every KV head, from `start` on."""
    queries = counts["q"] // counts["kv"]  # under one KV head
    sizes = [width(term) * (queries if term.unit == "q" else 1) for term in group]
    spans: list[Span] = []
    for kv, heads in part.groups:
        offset = start + kv * sum(sizes)
        for term, size in zip(group, sizes, strict=True):
            if term.unit == "q":
                shift = offset - kv * queries * width(term)
                spans += Spans([heads]).scaled(width(term)).shifted(shift)
            else:
                spans.append(Span(offset, offset + size))
            offset += size
    return spans

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
    """

    spans: Mapping[str, Spans]
    groups: tuple[tuple[int, Span], ...] = ()

    def size(self, unit: str) -> int:
        """The number of units of a kind that the rank has."""
        return self.spans[unit].length


@dataclass(frozen=True)
class Term:
    """A kind of unit on an axis, and how many features one unit has.

    `width` is a number or an attribute's name; "" for the width that all such terms
    share.
    """

    unit: str
    width: str


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

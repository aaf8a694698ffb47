"""The layout of an axis: which heads, columns or words lie where on it. Integers only.

A layout is written in words. `q` stands for all query heads, one after the other,
`kv` for all KV heads (or groups of a state space), `w` for the columns of an MLP, `v`
for the rows of a vocabulary: "q kv kv" is an axis of queries, then keys, then values.
Words in parentheses come once for every KV head, with the query heads under it:
"(q kv kv)". One unit of every word takes as many features, unless a colon says how
many, in figures or as an attribute of the module: "q:head_dim q:1".
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
        return self.spans[unit].length


@dataclass(frozen=True)
class Word:
    unit: str
    width: str  # "" if it is what all words have


@lru_cache
def parse(layout: str) -> tuple[tuple[Word, ...], ...]:
    """Parse a layout: a tuple for each word, or for the words in parentheses."""
    phrases = re.findall(r"\([^()]+\)|[^\s()]+", layout)
    return tuple(
        tuple(
            Word(unit, width)
            for unit, _, width in (word.partition(":") for word in words.split())
        )
        for words in (phrase.strip("()") for phrase in phrases)
    )


def place(
    layout: str,
    features: int,
    counts: Mapping[str, int],
    part: Part,
    width_of: Callable[[str], int],
) -> Spans:
    """Find the spans of a rank's `part` on an axis of `features` with this layout.

    `counts` are the units of the whole block; `width_of` says what an attribute of the
    module is, for widths by name.

    Raises: ValueError if the axis cannot be of this layout.
    """
    phrases = parse(layout)
    given = {
        word: int(word.width) if word.width.isdigit() else width_of(word.width)
        for phrase in phrases
        for word in phrase
        if word.width
    }
    words = [word for phrase in phrases for word in phrase]
    rest = features - sum(counts[w.unit] * given[w] for w in words if w in given)
    units = sum(counts[w.unit] for w in words if w not in given)
    common, odd = divmod(rest, units) if units else (0, rest)
    if odd or rest < 0:
        raise ValueError(f"an axis of {features} features is not laid out as {layout}")

    def width(word: Word) -> int:
        return given.get(word, common)

    spans: list[Span] = []
    start = 0
    for phrase in phrases:
        if len(phrase) == 1:
            (word,) = phrase
            spans += part.spans[word.unit].scaled(width(word)).shifted(start)
        else:
            spans += _groups(phrase, start, counts, part, width)
        start += sum(counts[word.unit] * width(word) for word in phrase)
    return Spans(spans).joined()


def _groups(
    phrase: tuple[Word, ...],
    start: int,
    counts: Mapping[str, int],
    part: Part,
    width: Callable[[Word], int],
) -> list[Span]:
    """The spans of words that come once for every KV head."""
    queries = counts["q"] // counts["kv"]  # under one KV head
    sizes = [width(word) * (queries if word.unit == "q" else 1) for word in phrase]
    spans: list[Span] = []
    for kv, (first, last) in part.groups:
        at = start + kv * sum(sizes)
        for word, size in zip(phrase, sizes, strict=True):
            if word.unit == "q":
                shift = at - kv * queries * width(word)
                spans += Spans([(first, last)]).scaled(width(word)).shifted(shift)
            else:
                spans.append(Span(at, at + size))
            at += size
    return spans

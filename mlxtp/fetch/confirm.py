"""Whether what came from the hub is what the hub says it has.

A hub gives hashes of whole files, and no rank has one. So the ranks put each file
together once more, a bite after another, and one of them hashes it as it passes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from mlxtp.checkpoint.headers import Header
from mlxtp.checkpoint.tensors import Tensor, read_items, seen_from
from mlxtp.comm.communicator import Communicator
from mlxtp.fetch import hub
from mlxtp.fetch.hub import Repo
from mlxtp.partition.spans import Slice, Span, Spans, length, spans_on, without

BITE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class _Bite:
    """Items `span` of some rows of a tensor, as seen from an axis; the file's next.

    `parts` says which of the items come from which rank.
    """

    file: str
    name: str
    axis: int
    rows: Span
    span: Span
    item_bytes: int
    parts: tuple[tuple[int, Spans], ...]

    def bytes_of(self, rank: int) -> int:
        items = sum(length(spans) for source, spans in self.parts if source == rank)
        return (self.rows[1] - self.rows[0]) * items * self.item_bytes


def wrong_files(
    comm: Communicator,
    repo: Repo,
    headers: Mapping[str, Header],
    tensors: Mapping[str, Tensor],
    show: bool = False,
) -> list[str]:
    """Those of the files of `headers` whose bytes are not what the hub's hash says.

    `tensors` have the pieces that are on this machine. Files for which the hub has no
    hash, or of which no rank has some part, are left out.

    Raises: UsageError on every rank if the hub does not give the files' beginnings.
    """
    has = comm.allgather_objects(
        {n: [p.part for p in t.pieces] for n, t in tensors.items() if t.pieces}
    )
    turns: list[list[_Bite]] = [[] for _ in range(comm.size)]  # of each rank
    sizes = [0] * comm.size
    hashers: dict[str, int] = {}
    for file, header in headers.items():
        bites = _bites(file, header, has)
        if header.sha256 and bites is not None:
            rank = hashers[file] = sizes.index(min(sizes))
            turns[rank] += bites
            sizes[rank] += sum(_size(bite) for bite in bites)
    beginnings: dict[str, np.ndarray] = {}
    with comm.agreement():
        if comm.rank == 0:
            for file in hashers:
                beginnings[file] = np.empty(headers[file].data_start, np.uint8)
                hub.fetch(repo, file, 0, beginnings[file])
    beginnings = comm.bcast(beginnings)
    digests = {
        file: hashlib.sha256(beginnings[file].data)
        for file, rank in hashers.items()
        if rank == comm.rank
    }
    with tqdm(
        total=sum(sizes), unit="B", unit_scale=True, desc="Comparing with the hub",
        leave=False, disable=not (show and comm.rank == 0),
    ) as bar:  # fmt: skip
        for turn in zip_longest(*turns):
            together = _together(comm, tensors, turn)
            if (bite := turn[comm.rank]) is not None:
                digests[bite.file].update(together.data)
            bar.update(sum(_size(it) for it in turn if it is not None))
    wrong = [f for f, it in digests.items() if it.hexdigest() != headers[f].sha256]
    return sorted(file for files in comm.allgather_objects(wrong) for file in files)


def _size(bite: _Bite) -> int:
    rows, (start, stop) = bite.rows[1] - bite.rows[0], bite.span
    return rows * (stop - start) * bite.item_bytes


def _bites(
    file: str, header: Header, has: Sequence[Mapping[str, Sequence[Slice]]]
) -> list[_Bite] | None:
    """A file's tensors in bites; None if no rank has some part of one."""
    bites: list[_Bite] = []
    for name, tensor in header.tensors.items():
        if 0 in tensor.shape:
            continue
        parts = [of_rank.get(name, ()) for of_rank in has]
        axes = {part.axis for of_rank in parts for part in of_rank} - {None}
        axis = max((axis for axis in axes if axis is not None), default=0)
        rows, items, item = seen_from(tensor, axis)
        left: Spans = ((0, items),)
        sources: list[tuple[int, Spans]] = []
        for rank, of_rank in enumerate(parts):
            here = [
                s for p in of_rank if p.axis in (None, axis) for s in spans_on(p, axis)
            ]
            after = without(left, here)
            if mine := without(left, after):
                sources.append((rank, mine))
            left = after
        if left:
            return None
        for some, span in _steps(rows, items, item):
            within = ((rank, _within(spans, span)) for rank, spans in sources)
            told = tuple((rank, spans) for rank, spans in within if spans)
            bites.append(_Bite(file, name, axis, some, span, item, told))
    return bites


def _steps(rows: int, items: int, item_bytes: int) -> Iterator[tuple[Span, Span]]:
    """Rows and items, in the order in which they lie in the file."""
    if rows == 1:
        step = max(1, BITE_BYTES // item_bytes)
        for start in range(0, items, step):
            yield (0, 1), (start, min(start + step, items))
        return
    step = max(1, BITE_BYTES // (items * item_bytes))
    for start in range(0, rows, step):
        yield (start, min(start + step, rows)), (0, items)


def _within(spans: Spans, limits: Span) -> Spans:
    first, last = limits
    cut = ((max(start, first), min(stop, last)) for start, stop in spans)
    return tuple((start, stop) for start, stop in cut if start < stop)


def _together(
    comm: Communicator, tensors: Mapping[str, Tensor], turn: Sequence[_Bite | None]
) -> np.ndarray:
    """Send each rank the parts of its bite; the bytes of this rank's: (n,)."""
    messages = []
    for bite in turn:
        parts = (
            [spans for rank, spans in bite.parts if rank == comm.rank] if bite else []
        )
        found = [
            read_items(tensors[bite.name], bite.axis, bite.rows, spans)
            for spans in parts
            if bite
        ]
        messages.append(found[0] if found else np.empty(0, np.uint8))
    mine = turn[comm.rank]
    sizes = [mine.bytes_of(rank) if mine else 0 for rank in range(comm.size)]
    received = comm.exchange(messages, sizes)
    if mine is None:
        return np.empty(0, np.uint8)
    rows, (first, last) = mine.rows[1] - mine.rows[0], mine.span
    together = np.empty((rows, (last - first) * mine.item_bytes), np.uint8)
    for rank, spans in mine.parts:
        data, done = received[rank].reshape(rows, -1), 0
        for start, stop in spans:
            width = (stop - start) * mine.item_bytes
            place = (start - first) * mine.item_bytes
            together[:, place : place + width] = data[:, done : done + width]
            done += width
    return together.reshape(-1)

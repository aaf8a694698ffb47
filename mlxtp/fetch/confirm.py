"""Whether what came from the hub is what the hub says it has.

A hub gives hashes of whole files, and no rank has one. So the ranks put each file
together once more, a chunk after another, and one of them hashes it as it passes.
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
from mlxtp.partition.spans import Slice, Span, Spans

CHUNK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class _Chunk:
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
        items = sum(spans.length for source, spans in self.parts if source == rank)
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
    has = comm.allgather_object(
        {n: [p.part for p in t.pieces] for n, t in tensors.items() if t.pieces}
    )
    turns: list[list[_Chunk]] = [[] for _ in range(comm.size)]  # of each rank
    sizes = [0] * comm.size
    hashers: dict[str, int] = {}
    for file, header in headers.items():
        chunks = _chunks(file, header, has)
        if header.sha256 and chunks is not None:
            rank = hashers[file] = sizes.index(min(sizes))
            turns[rank] += chunks
            sizes[rank] += sum(_size(chunk) for chunk in chunks)
    beginnings: dict[str, np.ndarray] = {}
    with comm.agreement():
        if comm.rank == 0:
            for file in hashers:
                beginnings[file] = np.empty(headers[file].data_start, np.uint8)
                hub.fetch(repo, file, 0, beginnings[file])
    beginnings = comm.bcast_object(beginnings)
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
            if (chunk := turn[comm.rank]) is not None:
                digests[chunk.file].update(together.data)
            bar.update(sum(_size(it) for it in turn if it is not None))
    wrong = [f for f, it in digests.items() if it.hexdigest() != headers[f].sha256]
    return sorted(file for files in comm.allgather_object(wrong) for file in files)


def _size(chunk: _Chunk) -> int:
    return chunk.rows.length * chunk.span.length * chunk.item_bytes


def _chunks(
    file: str, header: Header, has: Sequence[Mapping[str, Sequence[Slice]]]
) -> list[_Chunk] | None:
    """A file's tensors in chunks; None if no rank has some part of one."""
    chunks: list[_Chunk] = []
    for name, tensor in header.tensors.items():
        if 0 in tensor.shape:
            continue
        parts = [of_rank.get(name, ()) for of_rank in has]
        axes = {part.axis for of_rank in parts for part in of_rank} - {None}
        axis = max((axis for axis in axes if axis is not None), default=0)
        rows, items, item = seen_from(tensor, axis)
        left = Spans.whole(items)
        sources: list[tuple[int, Spans]] = []
        for rank, of_rank in enumerate(parts):
            here = [s for p in of_rank if p.axis in (None, axis) for s in p.on(axis)]
            after = left.difference(here)
            if mine := left.intersection(here):
                sources.append((rank, mine))
            left = after
        if left:
            return None
        for some, span in _steps(rows, items, item):
            within = ((rank, spans.intersection([span])) for rank, spans in sources)
            told = tuple((rank, spans) for rank, spans in within if spans)
            chunks.append(_Chunk(file, name, axis, some, span, item, told))
    return chunks


def _steps(rows: int, items: int, item_bytes: int) -> Iterator[tuple[Span, Span]]:
    """Rows and items, in the order in which they lie in the file."""
    if rows == 1:
        step = max(1, CHUNK_BYTES // item_bytes)
        for start in range(0, items, step):
            yield Span(0, 1), Span(start, min(start + step, items))
        return
    step = max(1, CHUNK_BYTES // (items * item_bytes))
    for start in range(0, rows, step):
        yield Span(start, min(start + step, rows)), Span(0, items)


def _together(
    comm: Communicator, tensors: Mapping[str, Tensor], turn: Sequence[_Chunk | None]
) -> np.ndarray:
    """Send each rank the parts of its chunk; the bytes of this rank's: (n,)."""
    messages = []
    for chunk in turn:
        parts = (
            [spans for rank, spans in chunk.parts if rank == comm.rank] if chunk else []
        )
        found = [
            read_items(tensors[chunk.name], chunk.axis, chunk.rows, spans)
            for spans in parts
            if chunk
        ]
        messages.append(found[0] if found else np.empty(0, np.uint8))
    mine = turn[comm.rank]
    sizes = [mine.bytes_of(rank) if mine else 0 for rank in range(comm.size)]
    received = comm.exchange(messages, sizes)
    if mine is None:
        return np.empty(0, np.uint8)
    rows = mine.rows.length
    together = np.empty((rows, mine.span.length * mine.item_bytes), np.uint8)
    for rank, spans in mine.parts:
        data, done = received[rank].reshape(rows, -1), 0
        for span in spans:
            width = span.length * mine.item_bytes
            place = (span.start - mine.span.start) * mine.item_bytes
            together[:, place : place + width] = data[:, done : done + width]
            done += width
    return together.reshape(-1)

"""Whether what came from the hub is what the hub says it has.

A hub gives hashes of whole files, and no rank has one. So the ranks put each file
together once more, a chunk after another, and one of them hashes it as it passes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from mlxtp.checkpoint.headers import Header
from mlxtp.checkpoint.progress import progress_bar
from mlxtp.checkpoint.tensors import Stack, StoredTensor
from mlxtp.comm.communicator import Communicator
from mlxtp.fetch import hub
from mlxtp.fetch.hub import Repo
from mlxtp.partition.spans import Slice, Span, Spans

CHUNK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Chunk:
    """Items `span` of some rows of a tensor in a file, as seen from an axis.

    `parts` says which of the items come from which rank.
    """

    file: str
    name: str
    axis: int
    rows: Span
    span: Span
    item_bytes: int
    parts: tuple[tuple[int, Spans], ...]

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self.rows.length * self.span.length * self.item_bytes

    def spans_of(self, rank: int) -> Spans:
        """The items that come from a rank."""
        return next((spans for source, spans in self.parts if source == rank), Spans())

    def bytes_of(self, rank: int) -> int:
        """Bytes that come from a rank."""
        return self.rows.length * self.spans_of(rank).length * self.item_bytes


def wrong_files(
    comm: Communicator,
    repo: Repo,
    headers: Mapping[str, Header],
    tensors: Mapping[str, StoredTensor],
    *,
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
    turns: list[list[Chunk]] = [[] for _ in range(comm.size)]  # of each rank
    sizes = [0] * comm.size
    hashers: dict[str, int] = {}
    for file, header in headers.items():
        chunks = _chunks(file, header, has)
        if header.sha256 and chunks is not None:
            rank = hashers[file] = sizes.index(min(sizes))
            turns[rank] += chunks
            sizes[rank] += sum(chunk.bytes for chunk in chunks)
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
    with progress_bar("Comparing with the hub", sum(sizes), show=show) as bar:
        for turn in zip_longest(*turns):
            together = _together(comm, tensors, turn)
            if (chunk := turn[comm.rank]) is not None:
                digests[chunk.file].update(together.data)
            bar.update(sum(chunk.bytes for chunk in turn if chunk is not None))
    wrong = [
        file
        for file, digest in digests.items()
        if digest.hexdigest() != headers[file].sha256
    ]
    return sorted(file for files in comm.allgather_object(wrong) for file in files)


def _chunks(
    file: str, header: Header, has: Sequence[Mapping[str, Sequence[Slice]]]
) -> list[Chunk] | None:
    """A file's tensors in chunks; None if no rank has some part of one."""
    chunks: list[Chunk] = []
    for name, stored in header.tensors.items():
        if 0 in stored.tensor.shape:
            continue
        parts = [of_rank.get(name, ()) for of_rank in has]
        axes = {part.axis for of_rank in parts for part in of_rank} - {None}
        axis = max((axis for axis in axes if axis is not None), default=0)
        stack = stored.tensor.seen_from(axis)
        left = Spans.whole(stack.items)
        sources: list[tuple[int, Spans]] = []
        for rank, of_rank in enumerate(parts):
            here = [s for p in of_rank if p.axis in (None, axis) for s in p.on(axis)]
            after = left.difference(here)
            if mine := left.intersection(here):
                sources.append((rank, mine))
            left = after
        if left:
            return None
        for some, span in _steps(stack):
            within = ((rank, spans.intersection([span])) for rank, spans in sources)
            held = tuple((rank, spans) for rank, spans in within if spans)
            chunks.append(Chunk(file, name, axis, some, span, stack.item_bytes, held))
    return chunks


def _steps(stack: Stack) -> Iterator[tuple[Span, Span]]:
    """Rows and items, in the order in which they lie in the file."""
    rows, items, item_bytes = stack
    if rows == 1:
        step = max(1, CHUNK_BYTES // item_bytes)
        for start in range(0, items, step):
            yield Span(0, 1), Span(start, min(start + step, items))
        return
    step = max(1, CHUNK_BYTES // (items * item_bytes))
    for start in range(0, rows, step):
        yield Span(start, min(start + step, rows)), Span(0, items)


def _together(
    comm: Communicator,
    tensors: Mapping[str, StoredTensor],
    turn: Sequence[Chunk | None],
) -> np.ndarray:
    """Send each rank the parts of its chunk; the bytes of this rank's: (n,) uint8."""
    messages = []
    with comm.agreement():
        for chunk in turn:
            message = np.empty(0, np.uint8)
            if chunk and (spans := chunk.spans_of(comm.rank)):
                message = tensors[chunk.name].items(chunk.axis, chunk.rows, spans)
            messages.append(message)
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
            column = (span.start - mine.span.start) * mine.item_bytes
            together[:, column : column + width] = data[:, done : done + width]
            done += width
    return together.reshape(-1)

"""Whether what came from the hub is what the hub says it has.

A hub gives hashes of whole files, and no rank has one. So the ranks put each file
together once more, a chunk after another, and one of them hashes it as it passes.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from mlxtp.checkpoint.cut import Origin
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

    `parts` says which of the items come from which rank. Of a copy that nobody reads
    the items are bytes, and rank 0 gets them from the hub, from `offset` on.
    """

    file: str
    name: str
    axis: int
    rows: Span
    span: Span
    item_bytes: int
    parts: tuple[tuple[int, Spans], ...]
    offset: int | None = None

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
    origin: Origin,
    files: Collection[str],
    tensors: Mapping[str, StoredTensor],
    *,
    show: bool = False,
) -> list[str]:
    """Those of `files` whose bytes are not what the hub's hash says.

    `tensors` have the pieces that are on this machine, as they will be read. Files for
    which the hub has no hash, or of which no rank has some part, are left out.

    Raises: UsageError on every rank if the hub does not give copies that nobody reads.
    """
    has = comm.allgather_object(
        {n: [p.part for p in t.pieces] for n, t in tensors.items() if t.pieces}
    )
    turns: list[list[Chunk]] = [[] for _ in range(comm.size)]  # of each rank
    sizes = [0] * comm.size
    hashers: dict[str, int] = {}
    for file, header in origin.headers.items():
        if file not in files or not header.sha256:
            continue
        if (chunks := _chunks(file, header, has, origin.different)) is not None:
            rank = hashers[file] = sizes.index(min(sizes))
            turns[rank] += chunks
            sizes[rank] += sum(chunk.bytes for chunk in chunks)
    digests = {
        file: hashlib.sha256(origin.headers[file].beginning)
        for file, rank in hashers.items()
        if rank == comm.rank
    }
    with progress_bar("Comparing with the hub", sum(sizes), show=show) as bar:
        for turn in zip_longest(*turns):
            together = _together(comm, repo, tensors, turn)
            if (chunk := turn[comm.rank]) is not None:
                digests[chunk.file].update(together.data)
            bar.update(sum(chunk.bytes for chunk in turn if chunk is not None))
    wrong = [
        file
        for file, digest in digests.items()
        if digest.hexdigest() != origin.headers[file].sha256
    ]
    return sorted(file for files in comm.allgather_object(wrong) for file in files)


def _chunks(
    file: str,
    header: Header,
    has: Sequence[Mapping[str, Sequence[Slice]]],
    different: Set[tuple[str, str]],
) -> list[Chunk] | None:
    """A file's tensors in chunks; None if no rank has some part of one."""
    chunks: list[Chunk] = []
    for name, stored in header.tensors.items():
        if 0 in stored.tensor.shape:
            continue
        if (file, name) in different:
            size = stored.tensor.bytes_of(Slice(stored.tensor.shape))
            for row, span in _steps(Stack(1, size, 1)):
                from_root = ((0, Spans([span])),)
                offset = stored.pieces[0].offset
                chunks.append(Chunk(file, name, 0, row, span, 1, from_root, offset))
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
    repo: Repo,
    tensors: Mapping[str, StoredTensor],
    turn: Sequence[Chunk | None],
) -> np.ndarray:
    """Send each rank the parts of its chunk; the bytes of this rank's: (n,) uint8."""
    ours = [chunk if chunk and chunk.spans_of(comm.rank) else None for chunk in turn]
    with comm.agreement():
        messages = [_message(comm.rank, repo, tensors, chunk) for chunk in ours]
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


def _message(
    rank: int, repo: Repo, tensors: Mapping[str, StoredTensor], chunk: Chunk | None
) -> np.ndarray:
    """What comes of a chunk from this rank: (n,) uint8.

    Raises: ValueError if the hub does not give it.
    """
    if chunk is None:
        return np.empty(0, np.uint8)
    if chunk.offset is None:
        stored = tensors[chunk.name]
        return stored.items(chunk.axis, chunk.rows, chunk.spans_of(rank))
    data = np.empty(chunk.bytes, np.uint8)
    hub.fetch(repo, chunk.file, chunk.offset + chunk.span.start, data)
    return data

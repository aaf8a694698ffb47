"""Runs of bytes in files, and how they are read into memory.

Memory is seen as rows of equal length. A run fills some columns of some rows from one
file, in which the rows lie at equal distances. A slice of a tensor is a few runs.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxtp.native import loader
from mlxtp.partition.spans import Span, Spans

# Spans that lie closer together than a page are read with what is between them: the
# disk reads the page anyway.
PAGE_BYTES = mmap.PAGESIZE
# The most that is read at once into memory which is not the array's own: it stays in
# a core's cache.
BLOCK_BYTES = 512 * 1024


@dataclass(frozen=True)
class Run:
    """Spans of bytes of equally distant rows in a file, and where they go in memory.

    The row `rows.start + i` of memory gets, from its byte `column` on, the bytes
    `spans` after `offset + i * stride` in the file, joined.
    """

    file: Path
    offset: int
    stride: int
    spans: Spans
    rows: Span
    column: int

    @property
    def columns(self) -> Span:
        """The bytes of each row of memory that it fills."""
        return Span(self.column, self.column + self.spans.length)

    def clipped(self, rows: Span, columns: Span) -> "Run":
        """What fills these rows and columns, which count from their first one."""
        own_rows = self.rows.intersection(rows)
        own_columns = self.columns.intersection(columns)
        return Run(
            self.file,
            self.offset + (own_rows.start - self.rows.start) * self.stride,
            self.stride,
            _between(self.spans, own_columns.shifted(-self.column)),
            own_rows.shifted(-rows.start),
            own_columns.start - columns.start,
        )

    def fill(self, memory: np.ndarray) -> None:
        """Read into `memory`, uint8 of (rows, bytes of a row).

        Raises: OSError if the file ends early or cannot be read.
        """
        target = memory[slice(*self.rows), slice(*self.columns)]
        if not target.size:
            return
        spans = self.spans
        gap = self.stride - spans.length  # bytes of a row that are not wanted
        if gap == 0 and len(spans) == 1 and target.flags.c_contiguous:
            target = target.reshape(1, -1)
            spans = Spans.whole(target.size)
        block = 0  # rows that are read at once
        if len(target) > 1 and gap < PAGE_BYTES:
            block = max(1, BLOCK_BYTES // self.stride)
        with open(self.file, "rb", buffering=0) as file:
            fd, done = file.fileno(), 0
            if (native := loader.reading()) is not None:
                done = native.fill(fd, target, self.offset, self.stride, spans, block)
            # What it has left is read here, which also tells why it stopped there.
            if block:
                self._fill_by_block(target, fd, block, done)
            else:
                self._fill_by_span(target, fd, spans, done)

    def _fill_by_span(
        self, target: np.ndarray, fd: int, spans: Spans, done: int
    ) -> None:
        """Read each span of each row by itself, straight to its place."""
        for number, row in enumerate(target[done:], done):
            filled = 0
            for span in spans:
                part = row[filled : filled + span.length]
                _pread(fd, part.data, self.offset + number * self.stride + span.start)
                filled += span.length

    def _fill_by_block(
        self, target: np.ndarray, fd: int, count: int, done: int
    ) -> None:
        """Read some rows at once with all that lies between, and copy the spans."""
        if done == len(target):
            return
        block = np.empty((count, self.stride), np.uint8)
        first, last = min(self.spans).start, max(self.spans).stop
        for number in range(done, len(target), count):
            rows = block[: len(target) - number]
            # From the first span of the first row to the last span of the last.
            wanted = rows.reshape(-1)[first : rows.size - (self.stride - last)]
            _pread(fd, wanted.data, self.offset + number * self.stride + first)
            filled = 0
            for start, stop in self.spans:
                part = target[number : number + len(rows), filled:][:, : stop - start]
                part[:] = rows[:, start:stop]
                filled += stop - start


@dataclass(frozen=True)
class ReadPlan:
    """The runs that fill memory of `rows` rows of `row_bytes` bytes."""

    rows: int
    row_bytes: int
    runs: tuple[Run, ...]

    def fill(self, memory: np.ndarray) -> None:
        """Read into `memory`, (rows * row_bytes,) uint8.

        Raises: OSError if a file ends early or cannot be read.
        """
        for run in self.runs:
            run.fill(memory.reshape(self.rows, self.row_bytes))

    def read(self) -> np.ndarray:
        """Read all bytes: (rows * row_bytes,) uint8. Errors as in `fill`."""
        memory = np.empty(self.rows * self.row_bytes, np.uint8)
        self.fill(memory)
        return memory

    def clipped(self, rows: Span, columns: Span | None = None) -> "ReadPlan":
        """The plan of some rows, and of some of their bytes."""
        columns = columns or Span(0, self.row_bytes)
        clipped = (run.clipped(rows, columns) for run in self.runs)
        return ReadPlan(
            rows.length,
            columns.length,
            tuple(run for run in clipped if run.rows.length and run.spans),
        )

    def blocks(self) -> Iterator[np.ndarray]:
        """Read the bytes in their order, at most BLOCK_BYTES at a time: (n,) uint8."""
        for _, plan in self.parts(BLOCK_BYTES):
            yield plan.read()

    def parts(self, most_bytes: int) -> Iterator[tuple[Span, "ReadPlan"]]:
        """Divide it into plans of at most `most_bytes`, in the order of the memory.

        Yields: the bytes of the memory that a plan fills, and the plan.
        """
        if 0 < self.rows * self.row_bytes <= most_bytes:
            yield Span(0, self.rows * self.row_bytes), self
            return
        columns = max(1, min(self.row_bytes, most_bytes))
        rows = most_bytes // columns if columns == self.row_bytes else 1
        for row in range(0, self.rows, rows):
            band = Span(row, min(row + rows, self.rows))
            for start in range(0, self.row_bytes, columns):
                part = Span(start, min(start + columns, self.row_bytes))
                begin = row * self.row_bytes + start
                plan = self.clipped(band, part)
                yield Span(begin, begin + band.length * part.length), plan


def _between(spans: Spans, offsets: Span) -> Spans:
    """The places that have these offsets once the spans are joined."""
    result, before = [], 0
    for span in spans:
        inside = offsets.intersection(Span(before, before + span.length))
        if inside.length:
            result.append(inside.shifted(span.start - before))
        before += span.length
    return Spans(result)


def _pread(fd: int, target: memoryview, offset: int) -> None:
    """Fill `target` from `offset` on.

    Raises: OSError if the file ends early or cannot be read.
    """
    while target:
        count = os.preadv(fd, (target,), offset)
        if count == 0:
            raise OSError(f"the file ends at byte {offset}, inside a tensor")
        target, offset = target[count:], offset + count

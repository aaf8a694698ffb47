"""The arrays of a checkpoint, and how slices of those that lie in files are read.

From a slice to its bytes it is two steps: `StoredTensor.plan` says which runs of which
files they are, and the plan's `fill` reads them.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.runs import ReadPlan, Run
from mlxtp.partition.spans import Slice, Span, Spans


@cache
def dtype_of(kind: str) -> mx.Dtype | None:
    """Ask MLX as what it reads a type of safetensors; None where it does not read it.

    `kind` is the type in the words of safetensors. Of those that MLX has no arithmetic
    for it reads some as bytes: float8, for instance.
    """
    entry = {"x": {"dtype": kind, "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(entry).encode()
    file = io.BytesIO(len(text).to_bytes(8, "little") + text)
    try:
        loaded: Any = mx.load(file, format="safetensors")
    except RuntimeError:
        return None
    return cast(mx.Dtype, loaded["x"].dtype)


def kind_of(dtype: mx.Dtype) -> str:
    """Ask MLX as which type of safetensors it saves an array."""
    file = io.BytesIO()
    mx.save_safetensors(file, {"x": mx.zeros((0,), dtype)})
    content = file.getvalue()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["x"]["dtype"])


def item_bits(kind: str) -> int:
    """Bits of an element of a type of safetensors, which its name says: F4, BF16.

    Raises: ValueError if it says none.
    """
    if dtype := dtype_of(kind):
        return dtype.size * 8
    if bits := re.match(r"[A-Z]+(\d+)", kind):
        return int(bits[1])
    raise ValueError(f"{kind} is no type of safetensors")


class Stack(NamedTuple):
    """An array as it is seen from one axis: rows of items of bytes."""

    rows: int
    items: int
    item_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.items * self.item_bytes


@dataclass(frozen=True)
class Tensor:
    """An array of a checkpoint, wherever it lies.

    `kind` is its type in the words of safetensors. One of a type that MLX does not read
    can be copied as a whole, and no more.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def is_readable(self) -> bool:
        """Whether MLX reads its type."""
        return dtype_of(self.kind) is not None

    @property
    def dtype(self) -> mx.Dtype:
        """The type that MLX reads it as; uint8 stands for types that it does not."""
        return dtype_of(self.kind) or mx.uint8

    def bytes_of(self, part: Slice) -> int:
        """Bytes of a slice."""
        return part.size * item_bits(self.kind) // 8

    def seen_from(self, axis: int) -> Stack:
        """See it as rows of items: an item is what lies at one place of `axis`."""
        items = self.shape[axis] if self.shape else 1
        item_bytes = prod(self.shape[axis + 1 :]) * item_bits(self.kind) // 8
        return Stack(prod(self.shape[:axis]), items, item_bytes)

    def read(self, part: Slice, read_tensor: "ReadTensor") -> mx.array:
        """Read a slice: a tensor is a parameter's source, as weight transforms are."""
        return read_tensor(self, part)

    def reads(self, part: Slice) -> "Iterator[tuple[Tensor, Slice]]":
        """Say which slices of tensors `read` asks for: this one."""
        yield self, part


ReadTensor = Callable[[Tensor, Slice], mx.array]


def bytes_of(slices: Mapping[Tensor, Slice]) -> int:
    """Bytes of slices of several tensors."""
    return sum(tensor.bytes_of(part) for tensor, part in slices.items())


@dataclass(frozen=True)
class Piece:
    """A part of an array that lies at `offset` bytes from the start of `file`."""

    file: Path
    offset: int
    part: Slice


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, and the pieces of it that lie on this machine.

    In an ordinary checkpoint there is one piece, the whole; in one that was cut there
    are some, or none.
    """

    tensor: Tensor
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(
        cls, name: str, kind: str, shape: Sequence[int], file: Path, offset: int
    ) -> "StoredTensor":
        """Make a tensor that lies in one piece."""
        part = Slice(tuple(shape))
        return cls(Tensor(name, kind, part.shape), (Piece(file, offset, part),))

    @property
    def is_whole(self) -> bool:
        """Whether it lies here in one piece."""
        return len(self.pieces) == 1 and self.pieces[0].part.axis is None

    def missing(self, part: Slice) -> Slice | None:
        """What of `part` no piece has; None if all of it is here."""
        if not self.pieces:
            return part if part.size else None
        axis = self._axis_of_pieces(part)
        gone = part.on(axis).difference(self._spans_here(axis))
        return Slice(part.full_shape, axis, gone) if gone else None

    def read(self, part: Slice) -> mx.array:
        """Read a slice, its bytes straight into the memory of the array.

        Raises: OSError if a file ends early or cannot be read, or a piece is not here.
        """
        array, memory = allocate(part.shape, self.tensor.dtype)
        self.plan(part).fill(memory)
        return array

    def plan(self, part: Slice) -> ReadPlan:
        """Say which runs of files fill the memory of a slice.

        The memory's rows are the tensor's as seen from the axis of the slice, wherever
        pieces are cut on that axis or there is a whole one.

        Raises: OSError if a piece is not here.
        """
        if not part.size:
            return ReadPlan(1, 0, ())
        if part.axis is None and self.is_whole:  # items may be less than a byte
            size, piece = self.tensor.bytes_of(part), self.pieces[0]
            everything = Spans.whole(size)
            run = Run(piece.file, piece.offset, size, everything, Span(0, 1), 0)
            return ReadPlan(1, size, (run,))
        cut = self._axis_of_pieces(part)
        if part.axis in (None, cut):
            return self._plan_columns(part, cut)
        return self._plan_across(part, part.axis, cut)

    def blocks(self, part: Slice) -> Iterator[np.ndarray]:
        """Read the bytes of a slice in their order, a block at a time: (n,) uint8."""
        return self.plan(part).blocks()

    def items(self, axis: int, rows: Span, spans: Spans) -> np.ndarray:
        """Read items `spans` of some rows, seen from an axis: (n,) uint8, row by row.

        Pieces must be cut on this axis, or whole.
        """
        plan = self.plan(Slice(self.tensor.shape, axis, spans))
        return plan.clipped(rows).read()

    def _plan_columns(self, part: Slice, axis: int) -> ReadPlan:
        """Plan a slice of the axis that the pieces are cut on."""
        rows, _, item = self.tensor.seen_from(axis)
        runs = [
            Run(
                piece.file,
                piece.offset,
                piece.part.on(axis).length * item,
                inside.scaled(item),
                Span(0, rows),
                offset * item,
            )
            for piece, inside, offset in self._held(part, axis)
        ]
        return ReadPlan(rows, part.on(axis).length * item, tuple(runs))

    def _plan_across(self, part: Slice, axis: int, cut: int) -> ReadPlan:
        """Plan a slice of another axis than the pieces are cut on.

        Of the two axes the first one makes bands of rows, the second one columns.
        """
        shape = self.tensor.shape
        whole = Slice(shape)
        first, second = sorted((axis, cut))
        _, _, item = self.tensor.seen_from(second)
        between = prod(shape[first + 1 : second])
        wanted = part.on(first).length, part.on(second).length
        runs = []
        for piece, inside, offset in self._held(whole, cut):
            held = piece.part.on(first).length, piece.part.on(second).length
            stride = held[1] * item
            if cut == first:
                bands, columns, column = inside, part.spans.scaled(item), 0
            else:
                bands, columns, column = part.spans, inside.scaled(item), offset * item
            for outer in range(prod(shape[:first])):
                target = outer * wanted[0] + (offset if cut == first else 0)
                for band in bands:
                    row = (outer * held[0] + band.start) * between
                    rows = Span(target, target + band.length)
                    runs.append(
                        Run(
                            piece.file,
                            piece.offset + row * stride,
                            stride,
                            columns,
                            Span(rows.start * between, rows.stop * between),
                            column,
                        )
                    )
                    target += band.length
        rows_of_memory = prod(shape[:first]) * wanted[0] * between
        return ReadPlan(rows_of_memory, wanted[1] * item, tuple(runs))

    def _held(self, part: Slice, axis: int) -> Iterator[tuple[Piece, Spans, int]]:
        """The pieces that `part` is in, one after the other.

        Yields: a piece, the places in it, and their offset in the part.
        """
        offset = 0
        for piece, group in groupby(self._spans_held(part, axis), itemgetter(0)):
            inside = Spans(span for _, span in group).joined()
            yield piece, inside, offset
            offset += inside.length

    def _spans_held(self, part: Slice, axis: int) -> Iterator[tuple[Piece, Span]]:
        pieces = [p for p in self.pieces if p.part.axis in (None, axis)]
        # One that was cut for this very slice is read at once.
        pieces = [p for p in pieces if p.part == part] or pieces
        for start, stop in part.on(axis):
            while start < stop:
                candidates = [
                    (min(span.stop, stop), number, before + start - span.start)
                    for number, piece in enumerate(pieces)
                    for before, span in _with_offsets(piece.part.on(axis))
                    if span.start <= start < span.stop
                ]
                if not candidates:
                    raise OSError(
                        f"{self.tensor.name}: of axis {axis} {start} to {stop} is not "
                        "here"
                    )
                reach, number, place = max(candidates)
                yield pieces[number], Span(place, place + reach - start)
                start = reach

    def _axis_of_pieces(self, part: Slice) -> int:
        """The axis of the pieces to read `part` from.

        Its own comes first, and then those of which nothing is missing.
        """
        own = part.axis or 0
        axes = [own if p.part.axis is None else p.part.axis for p in self.pieces]
        if len({*axes, own}) == 1:
            return own
        axes.sort(key=lambda axis: axis != own)
        complete = (
            axis
            for axis in axes
            if not part.on(axis).difference(self._spans_here(axis))
        )
        return next(complete, axes[0])

    def _spans_here(self, axis: int) -> Spans:
        return Spans(
            span
            for piece in self.pieces
            if piece.part.axis in (None, axis)
            for span in piece.part.on(axis)
        )


def _with_offsets(spans: Spans) -> Iterator[tuple[int, Span]]:
    """Each span, and where it begins when they are joined."""
    offset = 0
    for span in spans:
        yield offset, span
        offset += span.length

"""Arrays that lie in files: where the pieces of each are, and how slices are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.rows import BLOCK_BYTES, pread, read_rows, take
from mlxtp.partition.spans import Slice, Spans

# What MLX makes of the types of a safetensors file.
DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "F8_E4M3": mx.uint8,
}


@dataclass(frozen=True)
class Piece:
    """A part of an array that lies at `offset` bytes from the start of `file`."""

    file: Path
    offset: int
    part: Slice


@dataclass(frozen=True)
class Tensor:
    """An array of a checkpoint, and where the pieces of it that are here lie.

    `kind` is its type in the words of safetensors. In an ordinary checkpoint there is
    one piece, the whole; in one that was cut there are some, or none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> mx.Dtype:
        return DTYPES[self.kind]

    @property
    def is_whole(self) -> bool:
        """Whether it lies here in one piece."""
        return len(self.pieces) == 1 and self.pieces[0].part.axis is None

    def read(self, part: Slice, using: "Read | None" = None) -> mx.array:
        return (using or read)(self, part)

    def place(self) -> tuple[str, int]:
        """The file and the byte where it begins."""
        if not self.pieces:
            return "~", 0
        return str(self.pieces[0].file), self.pieces[0].offset

    def missing(self, part: Slice) -> Slice | None:
        """What of `part` no piece has; None if all of it is here."""
        if not self.pieces:
            return part if part.size else None
        if (axis := self._cut_axis()) is None:
            return None
        gone = part.on(axis).difference(self._spans_here(axis))
        return Slice(self.shape, axis, gone) if gone else None

    def _cut_axis(self) -> int | None:
        """The axis on which all pieces are cut; None where one is the whole."""
        axes = [piece.part.axis for piece in self.pieces]
        return axes[0] if axes and None not in axes else None

    def _spans_here(self, axis: int) -> Spans:
        return Spans(
            span
            for piece in self.pieces
            if piece.part.axis == axis
            for span in piece.part.spans
        )


Read = Callable[[Tensor, Slice], mx.array]


def read(tensor: Tensor, part: Slice) -> mx.array:
    """Read a slice of a tensor, its bytes straight into the memory of the array.

    Raises: OSError if a file ends early or cannot be read, or a piece is not here.
    """
    array, memory = allocate(part.shape, tensor.dtype)
    fill(memory, tensor, part)
    return array


def fill(memory: np.ndarray, tensor: Tensor, part: Slice) -> None:
    """Read the bytes of a slice into `memory`, (n,) uint8. Errors as in `read`."""
    if memory.size:
        _read_into(memory, tensor, part)


def whole_tensor(
    name: str, kind: str, shape: Sequence[int], file: Path, offset: int
) -> Tensor:
    """A tensor that lies in one piece."""
    part = Slice(tuple(shape))
    return Tensor(name, kind, part.shape, (Piece(file, offset, part),))


def blocks(tensor: Tensor, part: Slice) -> Iterator[np.ndarray]:
    """The bytes of a slice in their order, a block at a time: (n,) uint8."""
    cut, item = tensor._cut_axis(), tensor.dtype.size
    axis = cut if part.axis is None else part.axis
    if not tensor.shape or cut not in (None, axis):
        yield _read_bytes(tensor, part)
        return
    if axis:  # rows of the first axis are a tensor as well
        row = part.size // tensor.shape[0] * item
        step = max(1, BLOCK_BYTES // max(1, row))
        for start in range(0, tensor.shape[0], step):
            some = _band(tensor, start, min(start + step, tensor.shape[0]))
            yield _read_bytes(some, Slice(some.shape, part.axis, part.spans))
        return
    step = max(1, BLOCK_BYTES // (prod(tensor.shape[1:]) * item or 1))
    for first, last in part.on(0):
        for start in range(first, last, step):
            span = start, min(start + step, last)
            yield _read_bytes(tensor, Slice(tensor.shape, 0, Spans([span])))


def seen_from(tensor: Tensor, axis: int) -> tuple[int, int, int]:
    """Seen from an axis an array is a stack of rows of items.

    Returns: the number of rows, of items in each, and the bytes of an item.
    """
    rows, inner = prod(tensor.shape[:axis]), prod(tensor.shape[axis + 1 :])
    items = tensor.shape[axis] if tensor.shape else 1
    return rows, items, inner * tensor.dtype.size


def _flattened(tensor: Tensor, axis: int) -> Tensor:
    """The tensor as (rows, items, what is in an item), seen from an axis.

    Pieces that are cut on another axis are left out.
    """
    rows, items, item = seen_from(tensor, axis)
    shape = (rows, items, item // tensor.dtype.size)
    pieces = tuple(
        Piece(it.file, it.offset, Slice(shape, 1, it.part.on(axis)))
        for it in tensor.pieces
        if it.part.axis in (None, axis)
    )
    return Tensor(tensor.name, tensor.kind, shape, pieces)


def _band(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the first axis, on which no piece is cut."""
    assert tensor._cut_axis() != 0
    shape = (stop - start, *tensor.shape[1:])
    pieces = []
    for piece in tensor.pieces:
        row = piece.part.size // tensor.shape[0] * tensor.dtype.size
        part = Slice(shape, piece.part.axis, piece.part.spans)
        pieces.append(Piece(piece.file, piece.offset + start * row, part))
    return Tensor(tensor.name, tensor.kind, shape, tuple(pieces))


def read_items(
    tensor: Tensor, axis: int, rows: tuple[int, int], spans: Spans
) -> np.ndarray:
    """Read items `spans` of some rows, seen from an axis: (n,) uint8, row by row."""
    some = _band(_flattened(tensor, axis), *rows)
    return _read_bytes(some, Slice(some.shape, 1, spans))


def _read_bytes(tensor: Tensor, part: Slice) -> np.ndarray:
    memory = np.empty(part.size * tensor.dtype.size, np.uint8)
    fill(memory, tensor, part)
    return memory


def _read_into(memory: np.ndarray, tensor: Tensor, part: Slice) -> None:
    """Fill `memory` (bytes) with the slice `part` of `tensor`, from its pieces."""
    for piece in tensor.pieces:
        if piece.part == part:
            with open(piece.file, "rb", buffering=0) as file:
                return pread(file.fileno(), memory.data, piece.offset)
    axis = tensor._cut_axis()
    if axis is None:
        axis = part.axis or 0
    elif part.axis not in (None, axis):
        # Cut on another axis: put together, then cut.
        together = np.empty(prod(tensor.shape) * tensor.dtype.size, np.uint8)
        _read_into(together, tensor, Slice(tensor.shape))
        rows, _, item = seen_from(tensor, part.axis)
        spans = part.spans.scaled(item)
        take(together.reshape(rows, -1), memory.reshape(rows, -1), spans)
        return
    rows, _, item = seen_from(tensor, axis)
    into, filled = memory.reshape(rows, -1), 0
    for piece, spans in _found(tensor, part, axis):
        width = spans.length * item
        row = piece.part.on(axis).length * item
        target, mine = into[:, filled : filled + width], spans.scaled(item)
        with open(piece.file, "rb", buffering=0) as file:
            read_rows(target, file.fileno(), piece.offset, row, mine)
        filled += width


def _found(tensor: Tensor, part: Slice, axis: int) -> Iterator[tuple[Piece, Spans]]:
    """The pieces that `part` is in, one behind the other, and where in each."""
    for piece in tensor.pieces:
        if piece.part.axis is None:
            yield piece, part.on(axis)
            return
    for start, stop in part.on(axis):
        while start < stop:
            here = [
                (min(last, stop), number, before + start - first)
                for number, piece in enumerate(tensor.pieces)
                if piece.part.axis == axis
                for before, (first, last) in _with_places(piece.part.spans)
                if first <= start < last
            ]
            if not here:
                raise OSError(
                    f"{tensor.name}: of axis {axis} {start} to {stop} is not here"
                )
            reach, number, inside = max(here)
            yield tensor.pieces[number], Spans([(inside, inside + reach - start)])
            start = reach


def _with_places(spans: Spans) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each span, and where it begins when they lie one behind the other."""
    place = 0
    for start, stop in spans:
        yield place, (start, stop)
        place += stop - start

"""Operations of MLX by the part: which parts of its inputs a part of an output takes.

A region is a part of an array: for each axis the spans that are wanted of it. An
operation is given a node of a graph (its `arguments`, the shapes of its `inputs` and
outputs) and a region of its output; it returns the regions of its inputs, None for an
input of which nothing is needed, and how to compute the region from the others. It
returns None where the region cannot be had by itself: all of it can.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import mlx.core as mx

from mlxtp.partition.spans import Spans

Region = tuple[Spans, ...]
Pieces = Sequence[mx.array | None]
Found = tuple[list[Region | None], Callable[[list[Any]], mx.array]]


def whole(shape: Sequence[int]) -> Region:
    return tuple(Spans.whole(size) for size in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    return tuple(spans.length for spans in region)


def take(x: mx.array, have: Region, want: Region) -> mx.array:
    """The region `want` of an array of which `x` is the region `have`."""
    for axis, (held, wanted) in enumerate(zip(have, want, strict=True)):
        if held == wanted:
            continue
        offsets = held.offsets
        x = mx.take(x, mx.array([offsets[place] for place in wanted.indices]), axis)
    return x


def _each(function: Callable[..., mx.array]) -> Callable[..., Found]:
    """An operation on each element by itself."""

    def operation(node: Any, region: Region) -> Found:
        needed: list[Region | None] = [region] * len(node.inputs)
        return needed, lambda pieces: function(*pieces)

    return operation


def _as_type(node: Any, region: Region) -> Found:
    return [region], lambda pieces: pieces[0].astype(node.dtype)


def _decoded_fp8(node: Any, region: Region) -> Found:
    """What `recipes` traces for FP8: its input is the raw bytes as a type."""
    return [region], lambda pieces: mx.from_fp8(
        pieces[0].astype(mx.uint8), dtype=node.dtype
    )


def _transpose(node: Any, region: Region) -> Found:
    axes = list(node.arguments[0])
    needed = [region[axes.index(axis)] for axis in range(len(axes))]
    return [tuple(needed)], lambda pieces: pieces[0].transpose(axes)


def _concatenate(node: Any, region: Region) -> Found | None:
    axis = node.arguments[0]
    if not region[axis].is_ascending:
        return None
    needed: list[Region | None] = []
    start = 0
    for source in node.inputs:
        stop = start + source.shape[axis]
        spans = region[axis].intersection([(start, stop)]).shifted(-start)
        cut = (*region[:axis], spans, *region[axis + 1 :])
        needed.append(cut if spans else None)
        start = stop

    return needed, lambda pieces: mx.concatenate(pieces, axis)


def _split(node: Any, region: Region) -> Found:
    indices, axis = node.arguments
    start = (0, *indices)[node.output]
    spans = region[axis].shifted(start)
    cut = (*region[:axis], spans, *region[axis + 1 :])
    return [cut], lambda pieces: pieces[0]


def _slice(node: Any, region: Region) -> Found:
    starts, _, strides = node.arguments
    needed = tuple(
        spans.shifted(start)
        if stride == 1
        else Spans((p, p + 1) for i in spans.indices for p in [start + i * stride])
        for spans, start, stride in zip(region, starts, strides, strict=True)
    )
    return [needed], lambda pieces: pieces[0]


def _broadcast(node: Any, region: Region) -> Found:
    shape = node.inputs[0].shape
    own = region[len(region) - len(shape) :]
    needed = tuple(
        Spans.whole(1) if size == 1 else spans
        for size, spans in zip(shape, own, strict=True)
    )
    return [needed], lambda pieces: mx.broadcast_to(pieces[0], shape_of(region))


def _pad(node: Any, region: Region) -> Found | None:
    """Padding behind the end, as far as the region reaches into it."""
    _, low, _ = node.arguments
    sizes = node.inputs[0].shape
    if any(low) or not all(spans.is_ascending for spans in region):
        return None
    needed = tuple(
        spans.intersection([(0, size)])
        for spans, size in zip(region, sizes, strict=True)
    )
    width = [
        (0, spans.length - inside.length)
        for spans, inside in zip(region, needed, strict=True)
    ]
    value = whole(node.inputs[1].shape)
    return [needed, value], lambda pieces: mx.pad(
        pieces[0], width, "constant", pieces[1]
    )


def _view(node: Any, region: Region) -> Found | None:
    inner, outer = node.inputs[0].dtype.size, node.dtype.size
    spans = region[-1].scaled(outer)
    if any(edge % inner for span in spans for edge in span):
        return None
    last = Spans((a // inner, b // inner) for a, b in spans)
    return [(*region[:-1], last)], lambda pieces: mx.contiguous(pieces[0]).view(
        node.dtype
    )


def _reshape(node: Any, region: Region) -> Found:
    """Axes that become others in groups of the same product, one behind the other."""
    before = node.inputs[0].shape
    needed: list[Spans] = []
    middle: list[int] = []  # a length for each group, as far as it is needed
    pick: list[list[int] | None] = []  # places in it that are wanted
    inside: list[Region] = []
    for inner, outer in _groups(before, node.shape):
        sizes = [node.shape[i] for i in outer]
        wanted = tuple(region[i] for i in outer)
        flat = _flat(sizes, wanted)
        rest = prod(before[i] for i in inner[1:])
        held = flat.aligned(rest)
        if inner:
            needed.append(Spans((a // rest, b // rest) for a, b in held))
            needed += [Spans.whole(before[i]) for i in inner[1:]]
        middle.append(held.length)
        exact = _is_leading(sizes, wanted) and held == flat.merged()
        places = None
        if not exact:
            offsets = held.offsets
            places = [offsets[place] for place in _linear(sizes, wanted)]
        pick.append(places)
        inside.append(wanted)

    def compute(pieces: list[Any]) -> mx.array:
        x = pieces[0].reshape(middle)
        for axis, places in enumerate(pick):
            if places is not None:
                x = mx.take(x, mx.array(places), axis)
        return x.reshape(shape_of(region))

    return [tuple(needed)], compute


def _groups(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes in groups of the same product."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        inner, outer = [i] if i < len(before) else [], [j] if j < len(after) else []
        left, right = prod(before[k] for k in inner), prod(after[k] for k in outer)
        i, j = i + len(inner), j + len(outer)
        while left != right:
            if left < right:
                left, inner, i = left * before[i], [*inner, i], i + 1
            else:
                right, outer, j = right * after[j], [*outer, j], j + 1
        groups.append((inner, outer))
    return groups


def _is_leading(sizes: Sequence[int], region: Region) -> bool:
    """Whether only the first axis that is longer than 1 is cut, and in order."""
    seen = False
    for size, spans in zip(sizes, region, strict=True):
        if seen and spans != Spans.whole(size):
            return False
        seen = seen or size > 1
    return all(spans.is_ascending for spans in region)


def _flat(sizes: Sequence[int], region: Region) -> Spans:
    """What of the joined axes is needed, as the first of them says."""
    if not sizes:
        return Spans.whole(1)
    first = next((i for i, size in enumerate(sizes) if size > 1), 0)
    rest = prod(sizes[first + 1 :])
    return region[first].scaled(rest)


def _linear(sizes: Sequence[int], region: Region) -> list[int]:
    """Where the elements of a region lie on the joined axes."""
    places = [0]
    for size, spans in zip(sizes, region, strict=True):
        places = [place * size + i for place in places for i in spans.indices]
    return places


OPERATIONS: dict[str, Callable[[Any, Region], Found | None]] = {
    "Abs": _each(mx.abs),
    "Add": _each(mx.add),
    "ArcSinh": _decoded_fp8,
    "AsType": _as_type,
    "Broadcast": _broadcast,
    "Concatenate": _concatenate,
    "Divide": _each(mx.divide),
    "ExpandDims": _reshape,
    "Flatten": _reshape,
    "Multiply": _each(mx.multiply),
    "Negative": _each(mx.negative),
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Square": _each(mx.square),
    "Squeeze": _reshape,
    "Subtract": _each(mx.subtract),
    "Transpose": _transpose,
    "Unflatten": _reshape,
    "View": _view,
}

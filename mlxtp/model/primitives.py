"""MLX's primitives by the region: what of its inputs a region of an output takes.

A region is a part of an array: for each axis the spans that are wanted of it. A rule
in `PRIMITIVES` is given a node of a graph (its `arguments`, the shapes of its `inputs`
and outputs) and a region of its output. It returns what is `Needed` for that, or None
where the region cannot be had by itself, only as part of the whole output.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from mlxtp.partition.spans import Spans

Region = tuple[Spans, ...]


class Needed(NamedTuple):
    """What a region of an output takes.

    `regions` has a region for each input, None for one of which nothing is needed.
    `compute` makes the output's region of arrays with the others, in order.
    """

    regions: list[Region | None]
    compute: Callable[[list[mx.array]], mx.array]


def whole(shape: Sequence[int]) -> Region:
    """The region that is all of an array."""
    return tuple(Spans.whole(size) for size in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    """The shape of an array that holds a region."""
    return tuple(spans.length for spans in region)


def take(x: mx.array, have: Region, want: Region) -> mx.array:
    """Take the region `want` of an array of which `x` is the region `have`.

    Shapes: x shape_of(have) -> shape_of(want).
    """
    for axis, (held, wanted) in enumerate(zip(have, want, strict=True)):
        if held == wanted:
            continue
        offsets = held.offsets
        x = mx.take(x, mx.array([offsets[place] for place in wanted.indices]), axis)
    return x


def _each(function: Callable[..., mx.array]) -> Callable[..., Needed]:
    """A primitive that works on each element by itself."""

    def rule(node: Any, region: Region) -> Needed:
        return Needed([region] * len(node.inputs), lambda inputs: function(*inputs))

    return rule


def _numbered(*functions: Callable[..., mx.array]) -> Callable[..., Needed]:
    """Primitives of one name that work on each element: the argument tells which."""

    def rule(node: Any, region: Region) -> Needed:
        return _each(functions[int(node.arguments[0])])(node, region)

    return rule


def _reduced(*functions: Callable[..., mx.array]) -> Callable[..., Needed]:
    """Primitives of one name that make one element of all that lie on some axes.

    Arguments: which one, and the axes, or an axis.
    """

    def rule(node: Any, region: Region) -> Needed:
        number, axes = node.arguments[:2]
        axes = [axes] if isinstance(axes, int) else list(axes)
        inner = tuple(
            Spans.whole(size) if axis in axes else spans
            for axis, (size, spans) in enumerate(
                zip(node.inputs[0].shape, region, strict=True)
            )
        )
        axis = axes[0] if len(axes) == 1 else axes
        function = functions[int(number)]
        return Needed([inner], lambda inputs: function(inputs[0], axis, keepdims=True))

    return rule


def _arange(node: Any, region: Region) -> Needed:
    start, stop, step = node.arguments
    everything = mx.arange(start, stop, step, dtype=node.dtype)
    return Needed([], lambda inputs: take(everything, whole(node.shape), region))


def _gather(node: Any, region: Region) -> Needed | None:
    """What lies at some places of one axis; the places have the first axes."""
    axes, sizes = node.arguments
    source, *places = node.inputs
    rest = [n if i not in axes else 1 for i, n in enumerate(source.shape)]
    if len(axes) != 1 or list(sizes) != rest:
        return None
    (axis,) = axes
    count = len(places[0].shape)
    inner = list(region[count:])
    inner[axis] = Spans.whole(source.shape[axis])

    def compute(inputs: list[mx.array]) -> mx.array:
        taken = mx.take(inputs[0], inputs[1], axis)
        first = range(axis, axis + count)
        others = (i for i in range(taken.ndim) if i not in first)
        return taken.transpose(*first, *others).reshape(shape_of(region))

    return Needed([tuple(inner), region[:count]], compute)


# In the order of MLX's numbers.
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def _quantize(node: Any, region: Region) -> Needed | None:
    """Quantizing and dequantizing: whole groups of the last axis."""
    group, bits, number, undo = node.arguments
    mode, words = MODES[int(number)], group * bits // 32
    tensors = 3 if mode == "affine" else 2  # packed weights, scales, biases
    if len(node.inputs) != (tensors if undo else 1):
        return None
    length = group if undo else (words, 1, 1)[node.output]  # of a group in the output
    *outer, last = region
    held = last.aligned(length)
    groups = Spans((a // length, b // length) for a, b in held)
    inner = [groups.scaled(n) for n in ((words, 1, 1) if undo else (group,))]

    def compute(inputs: list[mx.array]) -> mx.array:
        if undo:
            packed, scales = inputs[:2]
            biases = inputs[2] if mode == "affine" else None
            made = mx.dequantize(
                packed, scales, biases, group, bits, mode, dtype=node.dtype
            )
        else:
            made = mx.quantize(inputs[0], group, bits, mode)[node.output]
        return take(made, (*outer, held), region)

    return Needed([(*outer, spans) for spans in inner[: len(node.inputs)]], compute)


def _as_type(node: Any, region: Region) -> Needed:
    return Needed([region], lambda inputs: inputs[0].astype(node.dtype))


def _decoded_fp8(node: Any, region: Region) -> Needed:
    """What `sources` traces for FP8; its input is the raw bytes as a floating type."""
    return Needed(
        [region],
        lambda inputs: mx.from_fp8(inputs[0].astype(mx.uint8), dtype=node.dtype),
    )


def _transpose(node: Any, region: Region) -> Needed:
    axes = list(node.arguments[0])
    inner = tuple(region[axes.index(axis)] for axis in range(len(axes)))
    return Needed([inner], lambda inputs: inputs[0].transpose(axes))


def _concatenate(node: Any, region: Region) -> Needed | None:
    axis = node.arguments[0]
    if not region[axis].is_ascending:
        return None
    regions: list[Region | None] = []
    start = 0
    for source in node.inputs:
        stop = start + source.shape[axis]
        spans = region[axis].intersection([(start, stop)]).shifted(-start)
        inner = (*region[:axis], spans, *region[axis + 1 :])
        regions.append(inner if spans else None)
        start = stop
    return Needed(regions, lambda inputs: mx.concatenate(inputs, axis))


def _split(node: Any, region: Region) -> Needed:
    indices, axis = node.arguments
    start = (0, *indices)[node.output]
    spans = region[axis].shifted(start)
    inner = (*region[:axis], spans, *region[axis + 1 :])
    return Needed([inner], lambda inputs: inputs[0])


def _slice(node: Any, region: Region) -> Needed:
    starts, _, strides = node.arguments
    inner = tuple(
        spans.shifted(start)
        if stride == 1
        else Spans((p, p + 1) for i in spans.indices for p in [start + i * stride])
        for spans, start, stride in zip(region, starts, strides, strict=True)
    )
    return Needed([inner], lambda inputs: inputs[0])


def _broadcast(node: Any, region: Region) -> Needed:
    shape = node.inputs[0].shape
    own = region[len(region) - len(shape) :]
    inner = tuple(
        Spans.whole(1) if size == 1 else spans
        for size, spans in zip(shape, own, strict=True)
    )
    return Needed([inner], lambda inputs: mx.broadcast_to(inputs[0], shape_of(region)))


def _pad(node: Any, region: Region) -> Needed | None:
    """Padding behind the end, as far as the region reaches into it."""
    _, low, _ = node.arguments
    sizes = node.inputs[0].shape
    if any(low) or not all(spans.is_ascending for spans in region):
        return None
    inner = tuple(
        spans.intersection([(0, size)])
        for spans, size in zip(region, sizes, strict=True)
    )
    width = [
        (0, spans.length - inside.length)
        for spans, inside in zip(region, inner, strict=True)
    ]
    value = whole(node.inputs[1].shape)
    return Needed(
        [inner, value],
        lambda inputs: mx.pad(inputs[0], width, "constant", inputs[1]),
    )


def _view(node: Any, region: Region) -> Needed | None:
    inner, outer = node.inputs[0].dtype.size, node.dtype.size
    spans = region[-1].scaled(outer)
    if any(edge % inner for span in spans for edge in span):
        return None
    last = Spans((a // inner, b // inner) for a, b in spans)
    return Needed(
        [(*region[:-1], last)],
        lambda inputs: mx.contiguous(inputs[0]).view(node.dtype),
    )


def _reshape(node: Any, region: Region) -> Needed:
    """Axes that become others in groups of the same product, one behind the other."""
    before = node.inputs[0].shape
    region_before: list[Spans] = []
    middle: list[int] = []  # a length for each group, as far as it is needed
    pick: list[list[int] | None] = []  # places in it that are wanted
    for inner, outer in _groups(before, node.shape):
        sizes = [node.shape[i] for i in outer]
        wanted = tuple(region[i] for i in outer)
        flat = _flat(sizes, wanted)
        rest = prod(before[i] for i in inner[1:])
        held = flat.aligned(rest)
        if inner:
            region_before.append(Spans((a // rest, b // rest) for a, b in held))
            region_before += [Spans.whole(before[i]) for i in inner[1:]]
        middle.append(held.length)
        exact = _is_leading(sizes, wanted) and held == flat.merged()
        places = None
        if not exact:
            offsets = held.offsets
            places = [offsets[place] for place in _linear(sizes, wanted)]
        pick.append(places)

    def compute(inputs: list[mx.array]) -> mx.array:
        x = inputs[0].reshape(middle)
        for axis, places in enumerate(pick):
            if places is not None:
                x = mx.take(x, mx.array(places), axis)
        return x.reshape(shape_of(region))

    return Needed([tuple(region_before)], compute)


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


# Those that take all of an axis, however little of the output is wanted.
WIDENING = {"ArgReduce", "Gather", "Reduce"}

PRIMITIVES: dict[str, Callable[[Any, Region], Needed | None]] = {
    "Abs": _each(mx.abs),
    "Add": _each(mx.add),
    "Arange": _arange,
    "ArcSinh": _decoded_fp8,
    "ArgReduce": _reduced(mx.argmin, mx.argmax),
    "AsType": _as_type,
    "BitwiseBinary": _numbered(
        mx.bitwise_and, mx.bitwise_or, mx.bitwise_xor, mx.left_shift, mx.right_shift
    ),
    "Broadcast": _broadcast,
    "Ceil": _each(mx.ceil),
    "Concatenate": _concatenate,
    "Divide": _each(mx.divide),
    "Equal": _each(mx.equal),
    "Exp": _each(mx.exp),
    "ExpandDims": _reshape,
    "Expm1": _each(mx.expm1),
    "Flatten": _reshape,
    "Floor": _each(mx.floor),
    "Full": _each(lambda value: value),
    "Gather": _gather,
    "Greater": _each(mx.greater),
    "GreaterEqual": _each(mx.greater_equal),
    "Less": _each(mx.less),
    "LessEqual": _each(mx.less_equal),
    "Log": _numbered(mx.log2, mx.log10, mx.log),
    "Log1p": _each(mx.log1p),
    "LogicalAnd": _each(mx.logical_and),
    "LogicalNot": _each(mx.logical_not),
    "LogicalOr": _each(mx.logical_or),
    "Maximum": _each(mx.maximum),
    "Minimum": _each(mx.minimum),
    "Multiply": _each(mx.multiply),
    "Negative": _each(mx.negative),
    "NotEqual": _each(mx.not_equal),
    "Pad": _pad,
    "Power": _each(mx.power),
    "Quantize": _quantize,
    "Reduce": _reduced(mx.all, mx.any, mx.sum, mx.prod, mx.min, mx.max),
    "Remainder": _each(mx.remainder),
    "Reshape": _reshape,
    "Round": _each(mx.round),
    "Select": _each(mx.where),
    "Sigmoid": _each(mx.sigmoid),
    "Sign": _each(mx.sign),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _numbered(mx.sqrt, mx.rsqrt),
    "Square": _each(mx.square),
    "Squeeze": _reshape,
    "StopGradient": _each(lambda x: x),
    "Subtract": _each(mx.subtract),
    "Tanh": _each(mx.tanh),
    "Transpose": _transpose,
    "Unflatten": _reshape,
    "View": _view,
}

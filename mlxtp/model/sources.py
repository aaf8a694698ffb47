"""Parameters that mlx-lm computes from a checkpoint's tensors, read by the slice.

What `sanitize` of a model does to a checkpoint, stacking experts, transposing,
splitting, dequantizing, is traced once as a graph of MLX's operations. A slice of a
parameter is asked for backwards through that graph, down to slices of tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.tensors import Read, Tensor, read
from mlxtp.model.primitives import OPERATIONS, Found, Region, shape_of, take, whole
from mlxtp.partition.spans import Slice, Spans


class Source(Protocol):
    """Where a parameter comes from."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> mx.Dtype: ...
    def read(self, part: Slice, using: Read | None = None) -> mx.array:
        """Read a slice of the parameter, slices of tensors with `using`."""

    def place(self) -> tuple[str, int]:
        """The first file and byte that are read: the order to read sources in."""


@dataclass(frozen=True)
class Computed:
    """A parameter that can only be computed whole: a slice is kept of it."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.array.dtype

    def read(self, part: Slice, using: Read | None = None) -> mx.array:
        return mx.contiguous(take(self.array, whole(self.shape), _region(part)))

    def place(self) -> tuple[str, int]:
        return "", 0


@dataclass(frozen=True)
class Node:
    """An operation of the graph, or one of several outputs of it."""

    name: str
    arguments: tuple[Any, ...]
    inputs: tuple["Node | Tensor | mx.array", ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: mx.Dtype
    output: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[self.output]

    def read(self, part: Slice, using: Read | None = None) -> mx.array:
        array = read_region(self, _region(part), using or read)
        mx.eval(array)
        return array

    def place(self) -> tuple[str, int]:
        return min((_place(source) for source in self.inputs), default=("~", 0))


def read_region(
    source: "Node | Tensor | mx.array", region: Region, using: Read = read
) -> mx.array:
    """Compute a region of a source, reading what it takes."""
    if isinstance(source, mx.array):
        return take(source, whole(source.shape), region)
    if isinstance(source, Tensor):
        part = _outermost(source, region)
        return take(using(source, part), _region(part), region)
    if (found := _found(source, region)) is not None:
        return _compute(source, found, using)
    # Not to be had by itself: all of it, from whole inputs.
    whole_array = _compute(source, _everything(source), using)
    return mx.contiguous(take(whole_array, whole(source.shape), region))


def _found(node: Node, region: Region) -> Found | None:
    return OPERATIONS[node.name](node, region)


def _everything(node: Node) -> Found:
    found = _found(node, whole(node.shape))
    assert found is not None
    return found


def needed(
    sources: Mapping[str, Source], slices: Mapping[str, Slice]
) -> dict[Tensor, Slice]:
    """The slices of tensors that reading `slices` of parameters takes.

    Raises: ValueError for a parameter that can only be computed whole.
    """
    result: dict[Tensor, Slice] = {}
    for name, part in slices.items():
        source = sources[name]
        if isinstance(source, Computed):
            raise ValueError(
                f"mlx-lm computes {name} of the checkpoint in a way that mlxtp cannot "
                "follow: it cannot be cut, and is only read from a whole one"
            )
        for tensor, wanted in reads(source, part):
            result[tensor] = result.get(tensor, wanted).union(wanted)
    return result


def reads(source: Source, part: Slice) -> Iterator[tuple[Tensor, Slice]]:
    """The slices of tensors that `source.read(part)` asks for, one after the other."""
    if isinstance(source, Tensor):
        yield source, part
    else:
        yield from _needed(source, _region(part))


def _needed(source: Any, region: Region) -> Iterator[tuple[Tensor, Slice]]:
    if isinstance(source, Tensor):
        yield source, _outermost(source, region)
    elif isinstance(source, Node):
        regions, _ = _found(source, region) or _everything(source)
        for inner, inner_region in zip(source.inputs, regions, strict=True):
            if inner_region is not None:
                yield from _needed(inner, inner_region)


def _compute(node: Node, found: Found, using: Read) -> mx.array:
    needed, compute = found
    parts = [
        (source, part)
        for source, part in zip(node.inputs, needed, strict=True)
        if part is not None
    ]
    if node.name == "Concatenate" and node.arguments[0] == 0 and len(parts) > 1:
        return _one_behind_the_other(parts, node.dtype, using)
    return compute([read_region(source, part, using) for source, part in parts])


def _one_behind_the_other(
    parts: Sequence[tuple["Node | Tensor | mx.array", Region]],
    dtype: mx.Dtype,
    using: Read,
) -> mx.array:
    """Join on the first axis, so that no two parts lie in memory besides the result."""
    shapes = [shape_of(region) for _, region in parts]
    length = sum(shape[0] for shape in shapes)
    array, memory = allocate((length, *shapes[0][1:]), dtype)
    filled = 0
    for source, region in parts:
        part = mx.contiguous(read_region(source, region, using))
        piece = part.reshape(-1).view(mx.uint8)
        memory[filled : filled + piece.size] = np.asarray(piece)
        filled += piece.size
    return array


def trace(
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    given: Mapping[str, mx.array],
    tensors: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> dict[str, Node]:
    """Trace how `sanitize` makes the `wanted` parameters out of `tensors`.

    `given` are arrays with the names, shapes and dtypes of the tensors.

    Returns: the parameters whose whole way is known; for others there is nothing.
    """
    names = list(given)
    events: list[dict[str, Any]] = []

    def sanitized(*arrays: mx.array) -> list[mx.array]:
        made = sanitize(dict(zip(names, arrays, strict=True)))
        return [made[name] for name in wanted]

    try:
        with _exportable():
            mx.export_function(events.append, sanitized, *given.values())
    except Exception:  # it looks at values, or does what cannot be exported
        return {}
    known: dict[str, Node | Tensor | mx.array] = {}
    outputs: list[Any] = []
    for event in events:
        if event["type"] == "inputs":
            for (key, *_), name in zip(event["inputs"], names, strict=True):
                known[key] = tensors[name]
        elif event["type"] == "outputs":
            outputs = event["outputs"]
        elif event["type"] == "constants":
            known.update(dict(event["constants"]))
        elif event["type"] == "primitive":
            inputs = [known.get(key) for key, *_ in event["inputs"]]
            if event["name"] not in OPERATIONS or any(i is None for i in inputs):
                continue  # what comes of it is not known either
            shapes = tuple(tuple(shape) for _, shape, _ in event["outputs"])
            for number, (key, _, dtype) in enumerate(event["outputs"]):
                made = Node(
                    event["name"],
                    tuple(event["arguments"]),
                    tuple(i for i in inputs if i is not None),
                    shapes,
                    dtype,
                    number,
                )
                if OPERATIONS[made.name](made, whole(made.shape)) is not None:
                    known[key] = made
    return {
        name: node
        for name, (key, *_) in zip(wanted, outputs, strict=True)
        if isinstance(node := known.get(key), Node)
    }


@contextmanager
def _exportable() -> Iterator[None]:
    """Put operations that MLX can export in the place of two that it cannot.

    An arcsinh stands for decoding FP8, which no checkpoint asks for otherwise.
    """
    contiguous, from_fp8 = mx.contiguous, mx.from_fp8
    mx.contiguous = lambda x, *_, **__: x
    mx.from_fp8 = lambda x, dtype=mx.bfloat16, **_: mx.arcsinh(x.astype(dtype))
    try:
        yield
    finally:
        mx.contiguous, mx.from_fp8 = contiguous, from_fp8


def _outermost(tensor: Tensor, region: Region) -> Slice:
    """The part of a tensor that a region lies in, cut on one axis: the first."""
    full = whole(tensor.shape)
    cut = next((i for i, spans in enumerate(region) if spans != full[i]), None)
    return Slice(tensor.shape, cut, Spans() if cut is None else region[cut])


def _region(part: Slice) -> Region:
    full = whole(part.full_shape)
    if part.axis is None:
        return full
    return (*full[: part.axis], part.spans, *full[part.axis + 1 :])


def _place(source: "Node | Tensor | mx.array") -> tuple[str, int]:
    return ("~", 0) if isinstance(source, mx.array) else source.place()

"""Where a model's parameters come from, and how slices of them are read.

A parameter is a tensor of the checkpoint, or mlx-lm's `sanitize` computes it: stacks
experts, transposes, splits, dequantizes. That is a *weight transform*. It is traced
once as a graph of MLX's primitives, through which a slice of the parameter is followed
backwards to slices of tensors. Tensors are known by name here, wherever they lie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.tensors import ReadTensor, Tensor
from mlxtp.model.primitives import PRIMITIVES, Needed, Region, shape_of, take, whole
from mlxtp.partition.spans import Slice, Spans


class Source(Protocol):
    """Where a parameter comes from: a `Tensor`, a `Node` or `Computed`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the parameter."""

    def read(self, part: Slice, read_tensor: ReadTensor) -> mx.array:
        """Read a slice of the parameter, by reading slices of tensors.

        Raises: OSError if a tensor cannot be read.
        """

    def reads(self, part: Slice) -> Iterator[tuple[Tensor, Slice]]:
        """Say which slices of tensors `read` asks for, one after the other."""


@dataclass(frozen=True)
class Computed:
    """A parameter that mlx-lm can only compute whole: a slice is kept of it."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return self.array.shape

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the parameter."""
        return self.array.dtype

    def read(self, part: Slice, read_tensor: ReadTensor) -> mx.array:
        """Compute the parameter from whole files, and take a slice of it."""
        return mx.contiguous(take(self.array, whole(self.shape), _region(part)))

    def reads(self, part: Slice) -> Iterator[tuple[Tensor, Slice]]:
        """Say which slices of tensors are asked for: none, MLX reads the files."""
        return iter(())


@dataclass(frozen=True)
class Node:
    """A primitive in the graph of a weight transform, or one of its several outputs.

    `shapes` are those of all outputs, `output` is the number of this one.
    """

    name: str
    arguments: tuple[Any, ...]
    inputs: tuple["Node | Tensor | mx.array", ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: mx.Dtype
    output: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.shapes[self.output]

    def read(self, part: Slice, read_tensor: ReadTensor) -> mx.array:
        """Read a slice of the output. Errors as in `Source.read`."""
        array = _read_region(self, _region(part), read_tensor)
        mx.eval(array)
        return array

    def reads(self, part: Slice) -> Iterator[tuple[Tensor, Slice]]:
        """Say which slices of tensors `read` asks for, one after the other."""
        return _reads(self, _region(part))

    def needed(self, region: Region) -> Needed | None:
        """What of the inputs a region takes; None if it cannot be had by itself."""
        return PRIMITIVES[self.name](self, region)

    def needed_for_all(self) -> Needed:
        """What of the inputs the whole output takes."""
        needed = self.needed(whole(self.shape))
        assert needed is not None
        return needed


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
        for tensor, wanted in source.reads(part):
            result[tensor] = result.get(tensor, wanted).union(wanted)
    return result


def trace(
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    tensors: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> dict[str, Node]:
    """Trace how `sanitize` makes the `wanted` parameters out of `tensors`.

    Returns: the parameters of which every step is known; others are left out.
    """
    names = list(tensors)
    arrays = [mx.zeros(tensor.shape, tensor.dtype) for tensor in tensors.values()]
    events: list[dict[str, Any]] = []

    def sanitized(*arrays: mx.array) -> list[mx.array]:
        made = sanitize(dict(zip(names, arrays, strict=True)))
        return [made[name] for name in wanted]

    try:
        with _exportable():
            mx.export_function(events.append, sanitized, *arrays)
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
            known.update(_nodes(event, known))
    return {
        name: node
        for name, (key, *_) in zip(wanted, outputs, strict=True)
        if isinstance(node := known.get(key), Node)
    }


def _nodes(
    event: Mapping[str, Any], known: Mapping[str, "Node | Tensor | mx.array"]
) -> Iterator[tuple[str, Node]]:
    """The outputs of a primitive, if it is one that can be followed."""
    inputs = [known[key] for key, *_ in event["inputs"] if key in known]
    if event["name"] not in PRIMITIVES or len(inputs) < len(event["inputs"]):
        return  # what comes of it is not known either
    shapes = tuple(tuple(shape) for _, shape, _ in event["outputs"])
    for number, (key, _, dtype) in enumerate(event["outputs"]):
        arguments = tuple(event["arguments"])
        node = Node(event["name"], arguments, tuple(inputs), shapes, dtype, number)
        if node.needed(whole(node.shape)) is not None:
            yield key, node


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


def _read_region(
    source: "Node | Tensor | mx.array", region: Region, read_tensor: ReadTensor
) -> mx.array:
    """Compute a region of a source, reading what it takes."""
    if isinstance(source, mx.array):
        return take(source, whole(source.shape), region)
    if isinstance(source, Tensor):
        part = _outermost(source, region)
        return take(read_tensor(source, part), _region(part), region)
    if (needed := source.needed(region)) is not None:
        return _compute(source, needed, read_tensor)
    # Not to be had by itself: all of it, from whole inputs.
    whole_array = _compute(source, source.needed_for_all(), read_tensor)
    return mx.contiguous(take(whole_array, whole(source.shape), region))


def _compute(node: Node, needed: Needed, read_tensor: ReadTensor) -> mx.array:
    parts = [
        (source, region)
        for source, region in zip(node.inputs, needed.regions, strict=True)
        if region is not None
    ]
    if node.name == "Concatenate" and node.arguments[0] == 0 and len(parts) > 1:
        return _join_rows(parts, node.dtype, read_tensor)
    return needed.compute(
        [_read_region(source, region, read_tensor) for source, region in parts]
    )


def _join_rows(
    parts: Sequence[tuple["Node | Tensor | mx.array", Region]],
    dtype: mx.Dtype,
    read_tensor: ReadTensor,
) -> mx.array:
    """Join on the first axis, so that no two parts lie in memory besides the result."""
    shapes = [shape_of(region) for _, region in parts]
    length = sum(shape[0] for shape in shapes)
    array, memory = allocate((length, *shapes[0][1:]), dtype)
    filled = 0
    for source, region in parts:
        part = mx.contiguous(_read_region(source, region, read_tensor))
        part_bytes = part.reshape(-1).view(mx.uint8)
        memory[filled : filled + part_bytes.size] = np.asarray(part_bytes)
        filled += part_bytes.size
    return array


def _reads(
    source: "Node | Tensor | mx.array", region: Region
) -> Iterator[tuple[Tensor, Slice]]:
    """The slices of tensors that `_read_region` asks for, one after the other."""
    if isinstance(source, Tensor):
        yield source, _outermost(source, region)
    elif isinstance(source, Node):
        needed = source.needed(region) or source.needed_for_all()
        for inner, inner_region in zip(source.inputs, needed.regions, strict=True):
            if inner_region is not None:
                yield from _reads(inner, inner_region)


def _outermost(tensor: Tensor, region: Region) -> Slice:
    """The part of a tensor that a region lies in, cut on one axis: the first."""
    full = whole(tensor.shape)
    cut = next((i for i, spans in enumerate(region) if spans != full[i]), None)
    return Slice(tensor.shape, cut, Spans() if cut is None else region[cut])


def _region(part: Slice) -> Region:
    """The region that a slice is."""
    full = whole(part.full_shape)
    if part.axis is None:
        return full
    return (*full[: part.axis], part.spans, *full[part.axis + 1 :])

"""Where a model's parameters come from, and how slices of them are read.

A parameter is a tensor of the checkpoint, or mlx-lm computes it of some: stacks
experts, transposes, splits, dequantizes. That is a *weight transform*. It is traced
once as a graph of MLX's primitives, through which a slice of the parameter is followed
backwards to slices of tensors. What cannot be followed is `Computed`, of whole tensors.
Tensors are known by name here, wherever they lie.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.tensors import ReadTensor, Tensor, bytes_of
from mlxtp.model.primitives import (
    PRIMITIVES,
    WIDENING,
    Needed,
    Region,
    shape_of,
    take,
    whole,
)
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
    """A parameter that can only be computed of whole `tensors`, by mlx-lm's own code.

    `compute` is given these by name. They are sorted by it: ranks that found them in
    different graphs go through them alike. Of several ranks one computes the parameter
    for all (`turns.compute_for_all`), and each keeps a band of the tensors.
    """

    tensors: tuple[Tensor, ...]
    compute: Callable[[dict[str, mx.array]], mx.array]
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def read(self, part: Slice, read_tensor: ReadTensor) -> mx.array:
        """Read whole tensors, and take a slice of what mlx-lm makes of them."""
        reads = self.reads(part)
        tensors = {tensor.name: read_tensor(tensor, all_) for tensor, all_ in reads}
        return cut_out(self.compute(tensors), part)

    def reads(self, part: Slice) -> Iterator[tuple[Tensor, Slice]]:
        """Say which tensors `read` asks for: whatever the slice, the same."""
        for tensor in self.tensors:
            yield tensor, Slice(tensor.shape)

    def band(self, tensor: Tensor, rank: int, size: int) -> Slice:
        """The rows of a tensor that one of `size` ranks keeps."""
        if not tensor.shape:
            return Slice(tensor.shape)  # one element, on every rank
        rows = tensor.shape[0]
        edges = rows * rank // size, rows * (rank + 1) // size
        return Slice(tensor.shape, 0, Spans([edges]))


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
        array = _Reading(self, region_of(part), read_tensor).result
        mx.eval(array)
        return array

    def reads(self, part: Slice) -> Iterator[tuple[Tensor, Slice]]:
        """Say which slices of tensors `read` asks for, one after the other."""
        for source, region in _uses(self, region_of(part)):
            if isinstance(source, Tensor):
                yield source, _outermost(source, region)

    def needed(self, region: Region) -> Needed | None:
        """What of the inputs a region takes; None if it cannot be had by itself."""
        return PRIMITIVES[self.name](self, region)

    def needed_for_all(self) -> Needed:
        """What of the inputs the whole output takes."""
        needed = self.needed(whole(self.shape))
        assert needed is not None
        return needed

    def parts_of(
        self, needed: Needed
    ) -> list[tuple["Node | Tensor | mx.array", Region]]:
        """The inputs of which something is needed, and what."""
        return [
            (source, region)
            for source, region in zip(self.inputs, needed.regions, strict=True)
            if region is not None
        ]

    def widens(self) -> bool:
        """Whether something on the way takes all of an axis."""
        return any(
            isinstance(source, Node) and source.name in WIDENING
            for source, _ in _uses(self, whole(self.shape))
        )

    def bytes_behind(self, part: Slice | None = None) -> int:
        """Bytes of the tensors that a slice takes; of the whole output by default."""
        taken: dict[Tensor, Slice] = {}
        for tensor, wanted in self.reads(part or Slice(self.shape)):
            taken[tensor] = taken.get(tensor, wanted).union(wanted)
        return bytes_of(taken)

    def parts(self, region: Region) -> list[tuple["Node | Tensor | mx.array", Region]]:
        """The regions of inputs that a region takes."""
        return self.parts_of(self.needed(region) or self.needed_for_all())


def computed_whole(source: Source) -> Computed:
    """The same parameter, to be computed of whole tensors, in the order of names."""
    if isinstance(source, Computed):
        return source
    everything = Slice(source.shape)
    tensors = {tensor for tensor, _ in source.reads(everything)}

    def compute(arrays: dict[str, mx.array]) -> mx.array:
        def read(tensor: Tensor, part: Slice) -> mx.array:
            return cut_out(arrays[tensor.name], part)

        return source.read(everything, read)

    in_order = sorted(tensors, key=lambda tensor: tensor.name)
    return Computed(tuple(in_order), compute, source.shape, source.dtype)


def needed(
    sources: Mapping[str, Source], slices: Mapping[str, Slice], rank: int, size: int
) -> dict[Tensor, Slice]:
    """The slices of tensors that one of `size` ranks keeps to have its parameters.

    `slices` are those of its parameters. Of what can only be computed whole it keeps
    bands of the tensors.
    """
    result: dict[Tensor, Slice] = {}
    for name, part in slices.items():
        source = sources[name]
        reads = source.reads(part)
        if isinstance(source, Computed):
            reads = ((t, source.band(t, rank, size)) for t in source.tensors)
        for tensor, wanted in reads:
            result[tensor] = result.get(tensor, wanted).union(wanted)
    return result


def uncuttable(
    sources: Mapping[str, Source], slices: Mapping[str, Slice]
) -> dict[str, Computed]:
    """What has to be computed whole because of the axis that `slices` cut it on.

    Half of such a parameter takes more than three quarters of the tensors behind it. A
    head that is divided by norms over its rows is one. The answer is the same for the
    slices of all ranks.
    """
    return {
        name: computed_whole(source)
        for name, part in slices.items()
        if isinstance(source := sources[name], Node)
        and part.axis is not None
        and source.widens()
        and source.bytes_behind(_half(part)) > 0.75 * source.bytes_behind()
    }


def _half(part: Slice) -> Slice:
    """The first half of the axis that a slice is cut on."""
    assert part.axis is not None
    spans = Spans.whole(part.full_shape[part.axis] // 2)
    return Slice(part.full_shape, part.axis, spans)


def trace(
    load: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    tensors: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> dict[str, Source]:
    """Trace how `load` makes the `wanted` parameters out of `tensors`.

    Returns: the parameters of which every step is known; others are left out.
    """
    names = list(tensors)
    arrays = [mx.zeros(tensor.shape, tensor.dtype) for tensor in tensors.values()]
    events: list[dict[str, Any]] = []

    def loaded(*arrays: mx.array) -> list[mx.array]:
        made = load(dict(zip(names, arrays, strict=True)))
        return [made[name] for name in wanted]

    try:
        with _exportable():
            mx.export_function(events.append, loaded, *arrays)
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
        name: _as_source(known[key])
        for name, (key, *_) in zip(wanted, outputs, strict=True)
        if key in known
    }


def _as_source(made: "Node | Tensor | mx.array") -> Source:
    """What a parameter is; an array that depends on no tensor becomes a node."""
    if isinstance(made, mx.array):
        return Node("Full", (), (made,), (made.shape,), made.dtype)
    return made


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


def _uses(
    source: "Node | Tensor | mx.array", region: Region, again: bool = False
) -> Iterator[tuple["Node | Tensor | mx.array", Region]]:
    """What a region takes, itself first: each region of each source once.

    With `again`, as often as it is used.
    """
    seen = set()
    waiting = [(source, region)]
    while waiting:
        source, region = waiting.pop()
        key = id(source), region
        if key in seen:
            if again:
                yield source, region
            continue
        seen.add(key)
        yield source, region
        if isinstance(source, Node):
            waiting += reversed(source.parts(region))


class _Reading:
    """One read of a region of a node; what several nodes use is made once.

    `result` is an array of the region.
    """

    def __init__(self, node: Node, region: Region, read_tensor: ReadTensor) -> None:
        self._read_tensor = read_tensor
        uses = _uses(node, region, again=True)
        self._uses_left = Counter((id(source), region) for source, region in uses)
        self._made: dict[tuple[int, Region], mx.array] = {}
        self.result = self._region(node, region)

    def _region(self, source: "Node | Tensor | mx.array", region: Region) -> mx.array:
        """Compute a region of a source, reading what it takes."""
        key = id(source), region
        self._uses_left[key] -= 1
        array = self._made.pop(key, None)
        if array is None:
            array = self._new_region(source, region)
        if self._uses_left[key]:
            self._made[key] = array
        return array

    def _new_region(
        self, source: "Node | Tensor | mx.array", region: Region
    ) -> mx.array:
        if isinstance(source, mx.array):
            return take(source, whole(source.shape), region)
        if isinstance(source, Tensor):
            part = _outermost(source, region)
            return take(self._read_tensor(source, part), region_of(part), region)
        if (needed := source.needed(region)) is not None:
            return self._computed(source, needed)
        # Not to be had by itself: all of it, from whole inputs.
        everything = self._computed(source, source.needed_for_all())
        return mx.contiguous(take(everything, whole(source.shape), region))

    def _computed(self, node: Node, needed: Needed) -> mx.array:
        parts = node.parts_of(needed)
        if node.name == "Concatenate" and node.arguments[0] == 0 and len(parts) > 1:
            return self._joined_rows(parts, node.dtype)
        return needed.compute([self._region(*part) for part in parts])

    def _joined_rows(
        self,
        parts: Sequence[tuple["Node | Tensor | mx.array", Region]],
        dtype: mx.Dtype,
    ) -> mx.array:
        """Join on the first axis; no two parts lie in memory besides the result."""
        shapes = [shape_of(region) for _, region in parts]
        length = sum(shape[0] for shape in shapes)
        array, memory = allocate((length, *shapes[0][1:]), dtype)
        filled = 0
        for source, region in parts:
            part = bytes_in(mx.contiguous(self._region(source, region)))
            memory[filled : filled + part.size] = part
            filled += part.size
        return array


def bytes_in(array: mx.array) -> np.ndarray:
    """The memory of a contiguous array.

    Shapes: array (...) -> (n,) uint8.
    """
    return np.asarray(array.reshape(-1).view(mx.uint8))


def cut_out(array: mx.array, part: Slice) -> mx.array:
    """A slice of a whole array, in memory of its own."""
    piece = mx.contiguous(take(array, whole(array.shape), region_of(part)))
    mx.eval(piece)
    return piece


def _outermost(tensor: Tensor, region: Region) -> Slice:
    """The part of a tensor that a region lies in, cut on one axis: the first."""
    full = whole(tensor.shape)
    cut = next((i for i, spans in enumerate(region) if spans != full[i]), None)
    return Slice(tensor.shape, cut, Spans() if cut is None else region[cut])


def region_of(part: Slice) -> Region:
    """The region that a slice is."""
    full = whole(part.full_shape)
    if part.axis is None:
        return full
    return (*full[: part.axis], part.spans, *full[part.axis + 1 :])

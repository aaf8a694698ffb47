"""Which slice of which parameter is whose, and the model changed to match.

`slice_table` is the one place that decides it: table of architectures x empty
model x weights of the ranks -> the slices of every rank, without any other rank
or any weight at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtp import architectures, partition
from mlxtp.architectures import Architecture, Cut
from mlxtp.communicator import Communicator
from mlxtp.heads import HeadShard, head_shards
from mlxtp.layers import (
    Communicating,
    EmptyLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelLinear,
)
from mlxtp.partition import Slice, Span, Spans

# The axis of each parameter that a cut divides, by the parameter's last name. The
# weights are (..., out, in), lora_a (in, r), lora_b (r, out). What is missing here
# is replicated: a row-parallel bias is added once, after the sum.
CUT_AXIS = {
    "column": {"weight": -2, "scales": -2, "biases": -2, "bias": -1, "lora_b": -1},
    "row": {"weight": -1, "scales": -1, "biases": -1, "lora_a": -2},
    "lookup": {"weight": -2, "scales": -2, "biases": -2, "lora_a": -2},
}


@dataclass(frozen=True)
class MatrixShards:
    """A matrix that is cut, and every rank's part, in features of the cut axis.

    `spans[rank]` are the features that a rank computes with, `covered[rank]` those
    that it holds: for a row cut through a quantized matrix, whole groups.
    """

    path: str
    cut: Cut
    features: int
    spans: tuple[Spans, ...]
    covered: tuple[Spans, ...]


@dataclass(frozen=True)
class SliceTable:
    """What every rank owns of one model.

    `matrices` and `heads` (of attention modules, one entry a rank) by path;
    `parameters` are the shapes of the whole model.
    """

    architecture: Architecture
    matrices: dict[str, MatrixShards]
    heads: dict[str, tuple[HeadShard, ...]]
    parameters: dict[str, tuple[int, ...]]

    @property
    def head_dims(self) -> set[int]:
        """The widths of the KV heads."""
        return {
            stop - start
            for matrix in self.matrices.values()
            if matrix.cut.axis == "kv heads"
            for start, stop in matrix.spans[0]
        }

    def slices(self, rank: int) -> dict[str, Slice]:
        """The slice of every parameter that `rank` owns, by the parameter's path."""
        return {
            name: self._slice(name, shape, rank)
            for name, shape in self.parameters.items()
        }

    def _slice(self, name: str, shape: tuple[int, ...], rank: int) -> Slice:
        path, _, leaf = name.rpartition(".")
        # The parameters of a LoRA layer lie one level deeper than the matrix.
        matrix = self.matrices.get(path) or self.matrices.get(path.rpartition(".")[0])
        axis = CUT_AXIS[matrix.cut.style].get(leaf) if matrix else None
        if matrix is None or axis is None:
            return Slice(shape)
        # Packed weights and scales have fewer elements than features.
        elements, features = shape[axis], matrix.features
        spans = tuple(
            (start * elements // features, stop * elements // features)
            for start, stop in matrix.covered[rank]
        )
        return Slice(shape, len(shape) + axis, spans)


def slice_table(model: nn.Module, weights: Sequence[int]) -> SliceTable:
    """Decide what every rank owns of `model`, whose arrays are not looked into.

    Args:
        model: a whole model of mlx-lm, with or without LoRA layers.
        weights: one positive number a rank, in whose proportion it gets work.

    Raises: ValueError if the model cannot be split so.
    """
    architecture = architectures.of(model)
    modules = dict(model.named_modules())
    matrices, heads = {}, {}
    for path, module in modules.items():
        if (cut := architecture.cut_of(path)) is None:
            continue
        parent = path.rpartition(".")[0]
        out_features, in_features = _features(module)
        features = in_features if cut.style == "row" else out_features
        if cut.axis == "vocabulary":
            spans = _one_each(partition.spans(features, weights, minimum=1))
        elif cut.axis == "mlp width":
            granule = _row_group_size(parent, modules[parent], architecture)
            spans = _one_each(partition.spans(features, weights, granule))
        else:
            num_heads = getattr(modules[parent], architecture.num_heads)
            num_kv_heads = getattr(modules[parent], architecture.num_kv_heads)
            shards = head_shards(num_heads, num_kv_heads, tuple(weights))
            heads[parent] = shards
            if cut.axis == "query heads":
                dims = features // num_heads
                spans = tuple(_scaled(shard.query_spans, dims) for shard in shards)
            else:
                dims = features // num_kv_heads
                spans = tuple(_scaled(shard.kv_spans, dims) for shard in shards)
        granule = _group_size(module) if cut.style == "row" else 1
        covered = tuple(partition.cover(needed, granule) for needed in spans)
        matrices[path] = MatrixShards(path, cut, features, spans, covered)
    parameters = {name: a.shape for name, a in tree_flatten(model.parameters())}
    return SliceTable(architecture, matrices, heads, parameters)


def parallelize(model: nn.Module, table: SliceTable, comm: Communicator) -> None:
    """Make `model`, whose parameters are this rank's slices, compute its part.

    `model.slice_table` tells afterwards what is whose.
    """
    model.slice_table = table
    modules = dict(model.named_modules())
    for path, shards in table.heads.items():
        local = shards[comm.rank]
        setattr(modules[path], table.architecture.num_heads, local.local_heads)
        setattr(modules[path], table.architecture.num_kv_heads, local.local_kv_heads)
    for path, matrix in table.matrices.items():
        parent, _, name = path.rpartition(".")
        layer = _parallel(modules[path], matrix, comm)
        if isinstance(layer, Communicating):
            layer.path = path
        setattr(modules[parent], name, layer)


def _parallel(module: nn.Module, matrix: MatrixShards, comm: Communicator) -> nn.Module:
    """The layer that does a rank's part of `module`."""
    if matrix.cut.style == "lookup":
        return VocabParallelEmbedding(module, comm, [s for (s,) in matrix.spans])
    if matrix.cut.axis == "vocabulary":
        return VocabParallelLinear(module, comm, [s for (s,) in matrix.spans])
    if matrix.cut.style == "column":
        return module
    spans, covered = matrix.spans[comm.rank], matrix.covered[comm.rank]
    if partition.length(spans) == 0:
        module = EmptyLinear(_features(module)[0])
    return RowParallelLinear(module, comm, spans, covered)


def _row_group_size(path: str, block: nn.Module, architecture: Architecture) -> int:
    """Features that the row-parallel matrices of the block at `path` keep together."""
    return max(
        _group_size(module)
        for name, module in block.items()
        if (cut := architecture.cut_of(f"{path}.{name}")) and cut.style == "row"
    )


def _one_each(cuts: Sequence[Span]) -> tuple[Spans, ...]:
    return tuple((span,) for span in cuts)


def _scaled(spans: Spans, factor: int) -> Spans:
    return tuple((start * factor, stop * factor) for start, stop in spans)


def _base(module: nn.Module) -> nn.Module:
    """The layer under a LoRA layer, or the layer itself."""
    return next((module[k] for k in ("linear", "embedding") if k in module), module)


def _group_size(module: nn.Module) -> int:
    """Input features that share a scale; 1 where nothing is quantized."""
    return getattr(_base(module), "group_size", 1)


def _features(module: nn.Module) -> tuple[int, int]:
    """The output and input features of a linear layer or an embedding."""
    layer = _base(module)
    out_features, in_elements = layer.weight.shape[-2:]
    packing = 32 / layer.bits if "scales" in layer else 1
    return out_features, round(in_elements * packing)

"""mlx-lm's model, changed to compute a rank's part."""

import copy
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards, base, child
from mlxtp.layers import ternary
from mlxtp.layers.adapt.table import ADAPTERS
from mlxtp.layers.norms import NormShard, RMSNormOverRanks
from mlxtp.layers.parallel import (
    Communicating,
    JointSum,
    RowParallelDoRA,
    RowParallelLinear,
    RowParallelRotated,
    Sum,
    VocabParallelEmbedding,
    VocabParallelLinear,
    sum_output,
)
from mlxtp.partition.layouts import Part, place
from mlxtp.sharding.table import MatrixShards, SliceTable


def parallelize(model: nn.Module, table: SliceTable, comm: Communicator) -> None:
    """Make `model`, whose parameters are this rank's slices, compute its part.

    `model.slice_table` tells afterwards what is whose, `model.comm` who the ranks are.
    """
    model.slice_table, model.comm = table, comm
    modules = dict(model.named_modules())
    sums: dict[str, Sum] = {}
    for places in table.joints:
        sums |= dict.fromkeys(places, JointSum(comm))
    for matrix in table.matrices.values():
        made = sums.get(matrix.path, comm.allreduce) if matrix.summed else None
        layer = _layer(child(model, matrix.path), matrix, modules, comm, made)
        if isinstance(layer, Communicating):
            layer.path, layer.inner = matrix.path, layer.inner or matrix.cut.inner
        _replace(model, matrix.path, layer)
    for path in table.outputs:
        sum_output(modules[path], sums.get(path, comm.allreduce), path)
    for shards in table.blocks:
        if shards.block.rule is not None and shards.parts:
            _resize(modules[shards.path], shards, shards.parts[comm.rank])
    for shards in table.blocks:
        if shards.block.adapt:
            ADAPTERS[shards.block.adapt](modules[shards.path], shards, comm)


def _layer(
    target: Any,
    matrix: MatrixShards,
    modules: dict[str, nn.Module],
    comm: Communicator,
    made: Sum | None,
) -> Any:
    """What takes the place of `target`, which holds the rank's part or is a list."""
    style, spans = matrix.cut.style, matrix.spans
    if style == "lookup":
        return VocabParallelEmbedding(target, comm, [s for (s,) in spans], made)
    if style == "head":
        return VocabParallelLinear(target, comm, [s for (s,) in spans])
    if style == "row" and hasattr(target, "block") and target.block:
        rotate = sys.modules[type(target).__module__].hadamard_rotate
        return RowParallelRotated(
            target, comm, spans, matrix.covered, made, rotate, not matrix.cuts_rotations
        )
    if style == "row":
        kind = RowParallelDoRA if isinstance(target, DoRALinear) else RowParallelLinear
        return kind(target, comm, spans[comm.rank], matrix.covered[comm.rank], made)
    if style == "repack":
        return ternary.repacked(target, spans[comm.rank], matrix.covered[comm.rank])
    if style == "norm":
        named = matrix.cut.groups
        groups = child(modules[matrix.block.path], named) if named else 1
        shard = NormShard(matrix.features, spans, comm.rank, groups)
        return RMSNormOverRanks(target, shard, comm)
    if style == "items":
        return [target[i] for i in spans[comm.rank].indices]
    if (
        isinstance(target, mx.array)
        and target.shape[matrix.cut.axis] == matrix.features
    ):
        # Computed by the model itself, and so still whole.
        own = mx.array(spans[comm.rank].indices)
        return mx.take(target, own, matrix.cut.axis)
    if hasattr(target, "out_features"):  # ternary weights, four in a byte
        target.out_features = 4 * target.weight.shape[-2]
    if isinstance(target, nn.Conv1d):
        target.groups = spans[comm.rank].length
    if hasattr(base(target), "indices") and style == "column":
        _split_where_parts_end(base(target), matrix, comm.rank)
    return target


def _split_where_parts_end(linear: nn.Module, matrix: MatrixShards, rank: int) -> None:
    """Set where a fused layer splits its outputs: where the rank's segments end."""
    starts = [0, *linear.indices]
    stops = [*linear.indices, matrix.features]
    sizes = [
        matrix.spans[rank].intersection([(start, stop)]).length
        for start, stop in zip(starts, stops, strict=True)
    ]
    linear.indices = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]


def _resize(module: nn.Module, shards: BlockShards, part: Part) -> None:
    """Set the counts and lengths that the module's forward pass reads."""
    block, sizes = shards.block, dict(shards.block.sizes)
    for name in getattr(block.rule, "queries", ()):
        sizes.setdefault(name, "q")
    kv = getattr(block.rule, "kv", ())
    for name in kv if isinstance(kv, tuple) else ():
        sizes.setdefault(name, "kv")
    local = {}
    for name, layout in sizes.items():
        whole = child(module, name)
        if whole is None or isinstance(whole, (nn.Module, mx.array)):
            continue
        if layout == "q/kv":
            local[name] = part.size("q") // part.size("kv")
        else:
            spans = place(
                layout,
                whole,
                shards.counts,
                part,
                lambda attribute: int(child(module, attribute)),
            )
            local[name] = spans.length
    for name, value in local.items():
        owner, _, attribute = name.rpartition(".")
        holder = child(module, owner)
        if owner and not isinstance(holder, nn.Module):
            # Arguments that all modules of the model share.
            holder = copy.copy(holder)
            setattr(module, owner, holder)
        setattr(holder, attribute, value)


def _replace(model: nn.Module, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    holder = child(model, owner)
    if isinstance(holder, list):
        holder[int(name)] = value
    else:
        setattr(holder, name, value)

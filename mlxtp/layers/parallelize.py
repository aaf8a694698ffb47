"""mlx-lm's model, changed to compute a rank's part."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards, child
from mlxtp.layers.adapt.table import ADAPTERS
from mlxtp.layers.experts import agree_on_experts
from mlxtp.layers.forward import RaisingTogether, change_forward
from mlxtp.layers.replace import BUILDERS, Site
from mlxtp.layers.sums import JointSum, SummedOutput, SumOverRanks
from mlxtp.partition.layouts import Part, fill, place
from mlxtp.sharding.table import SliceTable


def parallelize(
    model: nn.Module,
    table: SliceTable,
    comm: Communicator,
    *,
    agree_experts: bool = False,
) -> None:
    """Make `model`, whose parameters are this rank's slices, compute its part.

    Afterwards `model.slice_table` is `table`, and `model.comm` is `comm`. With
    `agree_experts` all ranks take rank 0's choice of experts.
    """
    model.slice_table, model.comm = table, comm
    modules = dict(model.named_modules())
    last = next(path for path, m in modules.items() if m is model.layers[-1])
    joints: dict[str, JointSum] = {}
    for path, places in table.joint_sums.items():
        joint = JointSum(comm, places)
        change_forward(modules[path], joint)
        joints |= dict.fromkeys(places, joint)

    def feeds_caches(path: str) -> bool:
        """Whether a cache depends on what is at a path.

        It does on all but the last layer, and on that where the family says so.
        """
        return table.family.loops or not path.startswith(f"{last}.")

    def sum_at(path: str, *, inner: bool) -> SumOverRanks:
        """What sums over ranks at a place; on an `inner` sum a cache depends."""
        feeds = inner or feeds_caches(path)
        return SumOverRanks(comm, path, feeds, joints.get(path))

    for path, matrix in table.matrices.items():
        total = sum_at(path, inner=matrix.cut.inner) if matrix.summed else None
        site = Site(child(model, path), matrix, comm, total)
        _replace(model, path, BUILDERS[matrix.cut.style](site))
    for path in table.outputs:
        total = sum_at(path, inner=False)
        change_forward(modules[path], SummedOutput(total))
    for shards in table.blocks:
        if shards.block.rule is not None and shards.parts:
            _resize(modules[shards.path], shards, shards.parts[comm.rank])
    for shards in table.blocks:
        if shards.block.adapt:
            ADAPTERS[shards.block.adapt](modules[shards.path], shards, comm)
    if agree_experts:
        agree_on_experts(modules, table, comm, feeds_caches)
    if comm.size > 1:
        change_forward(model, RaisingTogether(comm))


def _resize(module: nn.Module, shards: BlockShards, part: Part) -> None:
    """Set the counts and lengths that the module's forward pass reads."""

    def width_of(attribute: str) -> int:
        return int(child(module, attribute))

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
            local[name] = part.slots("q") // part.size("kv")
        else:
            axis = layout, whole, shards.counts, part, width_of
            zeros = sum(zeros for zeros, _ in fill(*axis))
            local[name] = place(*axis).length + zeros
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

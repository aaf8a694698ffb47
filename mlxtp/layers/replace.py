"""What takes the place of a matrix that is cut: a builder for each style.

A builder is given the matrix where it stands (`Site`) and returns what is to stand
there. Its parameters are this rank's already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.afm7 import FusedLinear, FusedQuantizedLinear
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.tuner.dora import DoRALinear

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import Style, base
from mlxtp.layers import ternary
from mlxtp.layers.forward import change_forward
from mlxtp.layers.norms import NormShard, RMSNormOverRanks
from mlxtp.layers.parallel import (
    InputGather,
    RowParallelDoRA,
    RowParallelLinear,
    RowParallelQuantized,
    RowParallelRotated,
    VocabParallelEmbedding,
    VocabParallelLinear,
)
from mlxtp.layers.sums import Sum
from mlxtp.layers.zeros import InputsWithoutZeros, OutputsWithZeros, with_zeros
from mlxtp.partition.layouts import Fill
from mlxtp.partition.spans import Span, Spans
from mlxtp.sharding.table import MatrixShards


@dataclass(frozen=True)
class Site:
    """A matrix that is cut, where the model has it.

    Args:
        target: the layer, the array or the list of layers that stands there.
        matrix: every rank's part of it.
        sum_over_ranks: what sums a partial output; None if it stays partial.
    """

    target: Any
    matrix: MatrixShards
    comm: Communicator
    sum_over_ranks: Sum | None

    @property
    def own(self) -> Spans:
        """The features that this rank computes with."""
        return self.matrix.spans[self.comm.rank]

    @property
    def covered(self) -> Spans:
        """The features that this rank holds."""
        return self.matrix.covered[self.comm.rank]

    @property
    def fill(self) -> Fill:
        """Where zeros stand among the features in the rank's attention."""
        return self.matrix.fills[self.comm.rank] if self.matrix.fills else ()

    @property
    def rows(self) -> list[Span]:
        """Every rank's rows of the vocabulary."""
        return [rows for (rows,) in self.matrix.spans]


def row(site: Site) -> nn.Module:
    """Multiply some of the inputs and sum."""
    layer = _row(site)
    if site.fill:
        change_forward(layer, InputsWithoutZeros(site.fill))
    return layer


def _row(site: Site) -> nn.Module:
    if isinstance(site.target, nn.QQLinear):
        return _quantizing(site)
    if site.matrix.together > 1:
        return _rotated(site)
    is_dora = isinstance(site.target, DoRALinear)
    kind = RowParallelDoRA if is_dora else RowParallelLinear
    return kind(site.target, site.comm, site.own, site.covered, site.sum_over_ranks)


def _quantizing(site: Site) -> nn.Module:
    """Multiply inputs that are quantized in groups first."""
    if not site.matrix.gathers_inputs:
        return RowParallelLinear(
            site.target, site.comm, sum_over_ranks=site.sum_over_ranks
        )
    gather = InputGather(site.matrix.spans, site.comm, site.matrix.path)
    return RowParallelQuantized(
        site.target, site.comm, site.covered, site.sum_over_ranks, gather
    )


def _rotated(site: Site) -> nn.Module:
    """Multiply inputs that are rotated in blocks first."""
    from mlx_lm.models.prism_hadamard_qwen35 import hadamard_rotate

    return RowParallelRotated(
        site.target,
        site.comm,
        site.matrix.spans,
        site.matrix.covered,
        site.sum_over_ranks,
        hadamard_rotate,
        is_aligned=not site.matrix.gathers_inputs,
        path=site.matrix.path,
    )


def column(site: Site) -> nn.Module:
    """The layer itself, which has fewer outputs."""
    layer = base(site.target)
    if isinstance(layer, BitLinear):
        layer.out_features = 4 * layer.weight.shape[-2]  # four in a byte
    if isinstance(layer, FusedLinear | FusedQuantizedLinear):
        # It splits its outputs where the rank's queries, keys and values end.
        layer.indices = [
            site.own.intersection([(0, end)]).length for end in layer.indices
        ]
    if site.fill:
        change_forward(site.target, OutputsWithZeros(site.fill))
    return site.target


def lookup(site: Site) -> nn.Module:
    """Look up some of the rows of an embedding and sum."""
    return VocabParallelEmbedding(
        site.target, site.comm, site.rows, site.matrix.path, site.sum_over_ranks
    )


def head(site: Site) -> nn.Module:
    """Make the logits of some of the rows and gather."""
    return VocabParallelLinear(site.target, site.comm, site.rows, site.matrix.path)


def along(site: Site) -> Any:
    """The layer or the array itself, of which every array is shorter."""
    target, axis = site.target, site.matrix.cut.axis
    if isinstance(target, mx.array):
        if target.shape[axis] == site.matrix.features:
            # Still whole: the model has computed it, no checkpoint holds it.
            target = mx.take(target, mx.array(site.own.indices), axis)
        return with_zeros(target, site.fill, axis) if site.fill else target
    if site.fill:
        filled = {n: with_zeros(a, site.fill, axis) for n, a in target.items()}
        target.update(filled)
    if isinstance(target, nn.Conv1d):
        target.groups = site.own.length
    return target


def norm(site: Site) -> nn.Module:
    """Norm over an axis of which every rank has a part."""
    matrix, comm = site.matrix, site.comm
    shard = NormShard(matrix.features, matrix.spans, comm.rank, matrix.groups)
    is_in_groups = bool(matrix.cut.groups)
    return RMSNormOverRanks(
        site.target, shard, comm, matrix.path, is_in_groups=is_in_groups
    )


def items(site: Site) -> list[Any]:
    """Some members of a list."""
    return [site.target[i] for i in site.own.indices]


def repack(site: Site) -> nn.Module:
    """Some outputs of a layer whose bytes hold four each, packed anew."""
    return ternary.repacked(site.target, site.own, site.covered)


BUILDERS: dict[Style, Callable[[Site], Any]] = {
    "row": row,
    "column": column,
    "lookup": lookup,
    "head": head,
    "along": along,
    "norm": norm,
    "items": items,
    "repack": repack,
}

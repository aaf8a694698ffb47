"""One choice of experts for all ranks: rank 0's.

Every rank computes the router, and a part of each expert that is chosen. Where machines
differ, some ranks may choose another of two experts that are nearly tied, and the sum
over ranks then mixes parts of both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.mlp import ROUTER_NAMES
from mlxtp.layers.forward import Forward, change_forward
from mlxtp.layers.sums import are_outputs_unread
from mlxtp.sharding.table import SliceTable


def agree_on_experts(
    modules: Mapping[str, nn.Module],
    table: SliceTable,
    comm: Communicator,
    feeds_caches: Callable[[str], bool],
) -> None:
    """Let every router of a model return what rank 0's returns.

    Some routers of mlx-lm choose the experts and give them weights. Others score them,
    and the block around chooses: on every rank from the same bytes. One (muse_spark's)
    only holds the weights with which the block scores: there the block gets rank 0's
    input.

    Args:
        modules: those of the model, by path.
        table: the model's.
        comm: the ranks.
        feeds_caches: whether a cache depends on what is at a path.
    """
    for path in routers(modules, table):
        agreement = _Agreement(comm, path, feeds_caches(path))
        if callable(modules[path]):
            change_forward(modules[path], agreement.on_output)
        else:
            change_forward(modules[path.rpartition(".")[0]], agreement.on_input)


def routers(modules: Mapping[str, nn.Module], table: SliceTable) -> Iterator[str]:
    """Yield the paths of the routers that a model has."""
    shared = {shards.path: shards.block.shared for shards in table.blocks}
    for path in modules:
        block, _, name = path.rpartition(".")
        is_shared = name in shared.get(block, ()) or name in table.family.shared
        if name in ROUTER_NAMES and is_shared:
            yield path


@dataclass(frozen=True)
class _Agreement:
    """Forward passes that take rank 0's part in the choice at `path`.

    Communicates: one broadcast of what the router returns for each token, or of the
        block's input; nothing in calls whose outputs nobody reads, if no cache depends
        on them.
    """

    comm: Communicator
    path: str
    feeds_caches: bool

    def on_output(
        self, former: Forward, router: nn.Module, *args: Any, **options: Any
    ) -> Any:
        """Call the router; return rank 0's scores, or its experts and weights."""
        y = former(router, *args, **options)
        if self._is_unread():
            return y
        if isinstance(y, mx.array):
            return self.comm.bcast(y, at=self.path)
        return _split(self.comm.bcast(_join(y), at=self.path), y)

    def on_input(
        self, former: Forward, block: nn.Module, x: mx.array, *args: Any, **options: Any
    ) -> Any:
        """Call the block around the router with rank 0's input."""
        if not self._is_unread():
            x = self.comm.bcast(x, at=self.path)
        return former(block, x, *args, **options)

    def _is_unread(self) -> bool:
        return are_outputs_unread() and not self.feeds_caches


def _join(arrays: Sequence[mx.array]) -> mx.array:
    """The bytes of arrays, one behind the other: (n,) uint8."""
    return mx.concatenate([mx.flatten(array).view(mx.uint8) for array in arrays])


def _split(joined: mx.array, like: Sequence[mx.array]) -> tuple[mx.array, ...]:
    """Cut what `_join` has made into arrays of the shapes and dtypes of `like`."""
    ends = list(accumulate(array.nbytes for array in like))
    return tuple(
        part.view(array.dtype).reshape(array.shape)
        for part, array in zip(mx.split(joined, ends[:-1]), like, strict=True)
    )

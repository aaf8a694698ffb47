"""A rank's forward passes, put into MLX's graph and never evaluated.

So whatever mlx-lm's model does, its arrays tell their sizes: weights that are read,
caches, and what is sent.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlxtp.comm.communicator import Communicator
from mlxtp.dryrun.calls import Call, watch
from mlxtp.layers.parallelize import parallelize
from mlxtp.layers.sums import outputs_unread
from mlxtp.model.skeleton import EmptyModel
from mlxtp.sharding.table import SliceTable

# mlx-lm reads a prompt in pieces of so many tokens.
PIECE = 2048
# Nodes of MLX's graph that start nothing. Weights are spread out zeros here.
VIEWS = {
    *("Full", "Broadcast", "Reshape", "Transpose", "ExpandDims", "Squeeze"),
    *("Flatten", "Unflatten", "Slice", "Split", "AsStrided", "Copy", "View"),
}


@dataclass(frozen=True)
class Step:
    """What a rank computes up to a collective, and the collective.

    `calls` are the layers with weights, `operations` what MLX starts, `made_bytes`
    what these layers give out. The last step of a pass may end in no collective.
    """

    path: str = ""
    kind: str = ""
    part_bytes: int = 0
    item_bytes: int = 2
    calls: tuple[Call, ...] = ()
    operations: int = 0

    @property
    def read_bytes(self) -> float:
        return sum(call.read_bytes for call in self.calls)

    @property
    def flops(self) -> float:
        return sum(call.flops for call in self.calls)

    @property
    def made_bytes(self) -> int:
        return sum(call.made_bytes for call in self.calls)


@dataclass(frozen=True)
class Rehearsed:
    """A rank's model: what it holds, and the steps of its passes.

    `caches` are each layer's with all the context in them; `piece` is the last piece
    of the prompt, `token` what is computed for the token behind it.
    """

    held_bytes: int
    caches: tuple["Cached", ...]
    piece: tuple[Step, ...]
    token: tuple[Step, ...]

    @property
    def item_bytes(self) -> int:
        """Of an activation."""
        return self.token[0].item_bytes

    @property
    def cached_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)


@dataclass(frozen=True)
class Cached:
    """A layer's cache: bytes; the tokens it keeps; elements of a token and head."""

    nbytes: int
    tokens: int
    width: int


@dataclass
class _Script:
    """What has happened since the last collective."""

    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def end(self, step: Step) -> None:
        self.steps.append(replace(step, calls=tuple(self.calls)))
        self.calls.clear()

    def taken(self) -> tuple[Step, ...]:
        """The steps so far, which are forgotten."""
        steps = tuple(self.steps)
        self.steps.clear()
        self.calls.clear()
        return steps


class RehearsingCommunicator(Communicator):
    """A rank of a world that is not there: it writes down what would be sent."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.script = _Script()
        self.counts_operations = False
        # While they are here no other node of the graph has their numbers.
        self._counted: list[mx.array] = []
        self._seen: set[str] = set()

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        self._write_down("allreduce", x, at)
        return mx.zeros(x.shape, x.dtype)

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str = "") -> mx.array:
        self._write_down("allgather", x, at)
        return mx.zeros((*x.shape[:-1], sum(sizes)), x.dtype)

    def _write_down(self, kind: str, x: mx.array, at: str) -> None:
        operations = self.operations(x) if self.counts_operations else 0
        size = x.dtype.size
        self.script.end(Step(at, kind, x.nbytes, size, operations=operations))

    def operations(self, x: mx.array) -> int:
        """What MLX starts to compute `x`, beside what it has started before."""
        drawn = io.StringIO()
        mx.export_to_dot(drawn, x)
        nodes = dict(re.findall(r'{ (\d+) \[label ="(\w+)"', drawn.getvalue()))
        new = nodes.keys() - self._seen
        self._seen |= new
        self._counted.append(x)
        return sum(nodes[node] not in VIEWS for node in new)


def rehearse(
    empty: EmptyModel, table: SliceTable, rank: int, batch: int, context: int
) -> Rehearsed:
    """Let `empty` become the rank's model and compute, without evaluating.

    A prompt of `context` - 1 tokens is read as mlx-lm reads it, then a token follows.
    """
    ranks = len(next(iter(table.matrices.values())).spans)
    comm = RehearsingCommunicator(rank, ranks)
    model = empty.model
    for name, part in table.slices(rank).items():
        array = mx.zeros(part.shape, empty.sources[name].dtype)
        model.update(tree_unflatten([(name, array)]))
    empty.sources.clear()
    parallelize(model, table, comm)
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    watch(model, comm.script.calls)
    caches = make_prompt_cache(model)
    *read, last = _pieces(context - 1)
    piece: tuple[Step, ...] = ()
    for tokens in [sum(read), last]:
        if tokens:
            comm.script.taken()
            with outputs_unread():
                model(mx.zeros((batch, tokens), mx.int32), cache=caches)
            piece = comm.script.taken()
    _call(model, comm, batch, caches)
    token = comm.script.taken()
    comm.counts_operations = True
    _call(model, comm, batch, make_prompt_cache(model))
    counted = comm.script.taken()
    token = tuple(
        replace(step, operations=other.operations)
        for step, other in zip(token, counted, strict=True)
    )
    kept = tuple(Cached(*_sizes(cache)) for cache in caches)
    return Rehearsed(held, kept, piece, token)


def _call(
    model: nn.Module, comm: RehearsingCommunicator, batch: int, caches: Any
) -> None:
    logits = model(mx.zeros((batch, 1), mx.int32), cache=caches)
    operations = comm.operations(logits) if comm.counts_operations else 0
    comm.script.end(Step(operations=operations))


def _pieces(tokens: int) -> list[int]:
    whole, rest = divmod(tokens, PIECE)
    return [PIECE] * whole + ([rest] if rest or not whole else [])


def _sizes(cache: Any) -> tuple[int, int, int]:
    """Bytes of a cache; of what has a place for each token: places, elements."""
    arrays = [x for _, x in tree_flatten(_arrays(cache)) if isinstance(x, mx.array)]
    placed = [x for x in arrays if x.ndim == 4]
    return (
        sum(x.nbytes for x in arrays),
        max((x.shape[2] for x in placed), default=0),
        sum(x.shape[3] for x in placed),
    )


def _arrays(cache: Any) -> Any:
    """All that a cache holds, with the room that it keeps for more tokens."""
    if hasattr(cache, "caches"):
        return [_arrays(inner) for inner in cache.caches]
    return [x for x in vars(cache).values() if isinstance(x, mx.array | list | tuple)]

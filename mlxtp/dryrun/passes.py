"""A rank's forward passes, put into MLX's graph and never evaluated.

Whatever mlx-lm's model does, its arrays have shapes. They tell which weights are read,
how long caches are, and what is sent.
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
from mlxtp.comm.request import Request
from mlxtp.dryrun.calls import Call, record_calls
from mlxtp.layers.parallelize import parallelize
from mlxtp.layers.sums import outputs_unread
from mlxtp.model.skeleton import EmptyModel
from mlxtp.sharding.table import SliceTable

# mlx-lm reads a prompt in chunks of so many tokens.
CHUNK_TOKENS = 2048
# Nodes of MLX's graph that start no kernel. "Full" is among them because the weights
# of a dry run are zeros.
VIEWS = {
    *("Full", "Broadcast", "Reshape", "Transpose", "ExpandDims", "Squeeze"),
    *("Flatten", "Unflatten", "Slice", "Split", "AsStrided", "Copy", "View"),
}


@dataclass(frozen=True)
class Step:
    """What a rank computes up to a collective, and the collective.

    `kind` is "allreduce" or "allgather"; it is empty in the last step of a pass that
    ends without a collective. `path` is the layer that communicates. The rank brings
    `part_bytes` bytes, in elements of `item_bytes`. `calls` are the calls of layers
    with weights, `operations` the operations that MLX starts.
    """

    path: str = ""
    kind: str = ""
    part_bytes: int = 0
    item_bytes: int = 2
    calls: tuple[Call, ...] = ()
    operations: int = 0

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that are read."""
        return sum(call.read_bytes for call in self.calls)

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products."""
        return sum(call.flops for call in self.calls)

    @property
    def output_bytes(self) -> int:
        """Bytes of the outputs of all layers with weights."""
        return sum(call.output_bytes for call in self.calls)

    def times(self, factor: float) -> "Step":
        """Return the same step for `factor` times as many tokens."""
        return replace(
            self,
            part_bytes=round(factor * self.part_bytes),
            calls=tuple(call.times(factor) for call in self.calls),
        )


@dataclass(frozen=True)
class CacheSize:
    """A layer's cache: its bytes, the tokens that it has room for, and its width.

    `width` is the number of elements that a token and KV head take, keys and values
    together; 0 for a state that has no place for each token.
    """

    nbytes: int
    tokens: int
    width: int


@dataclass(frozen=True)
class DryRun:
    """What a rank's model holds, and the steps of its passes.

    `held_bytes` are the bytes of its parameters. `caches` are the layers' caches with
    the whole context in them. `chunk` are the steps of the last chunk of the prompt, or
    of its only token, `token` those of the token after it.
    """

    held_bytes: int
    caches: tuple[CacheSize, ...]
    chunk: tuple[Step, ...]
    token: tuple[Step, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of an element of an activation."""
        return self.token[0].item_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches)


@dataclass
class _Script:
    """The steps so far, and the calls since the last collective."""

    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def end_step(self, step: Step) -> None:
        self.steps.append(replace(step, calls=tuple(self.calls)))
        self.calls.clear()

    def take(self) -> tuple[Step, ...]:
        """Return the steps so far and forget them."""
        steps = tuple(self.steps)
        self.steps.clear()
        self.calls.clear()
        return steps


class DryRunCommunicator(Communicator):
    """A rank of a world that does not exist: it records what would be sent.

    Its collectives return zeros of the right shape.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.script = _Script()
        self.counts_operations = False
        # Nodes are told apart by addresses, so what was counted has to stay alive.
        self._counted: list[mx.array] = []
        self._seen: set[str] = set()

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        """Record an allreduce of `x` and return zeros of its shape."""
        self._record("allreduce", x, at)
        return mx.zeros(x.shape, x.dtype)

    def iallreduce(self, x: mx.array, at: str = "") -> Request:
        """Record an allreduce, and return a request that is done."""
        y = self.allreduce(x, at)
        return Request(lambda: y)

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str = "") -> mx.array:
        """Record an allgather of `x` and return zeros of the joined shape."""
        self._record("allgather", x, at)
        return mx.zeros((*x.shape[:-1], sum(sizes)), x.dtype)

    def _record(self, kind: str, x: mx.array, at: str) -> None:
        operations = self.count_operations(x) if self.counts_operations else 0
        size = x.dtype.size
        self.script.end_step(Step(at, kind, x.nbytes, size, operations=operations))

    def count_operations(self, x: mx.array) -> int:
        """Count what MLX starts to compute `x`, without what was counted before."""
        drawn = io.StringIO()
        mx.export_to_dot(drawn, x)
        nodes = dict(re.findall(r'{ (\d+) \[label ="(\w+)"', drawn.getvalue()))
        new = nodes.keys() - self._seen
        self._seen |= new
        self._counted.append(x)
        return sum(nodes[node] not in VIEWS for node in new)


def become_rank(empty: EmptyModel, table: SliceTable, rank: int) -> DryRunCommunicator:
    """Turn `empty` into the model of one rank, with zeros that are never evaluated.

    Afterwards `empty.sources` is empty: the model is the rank's and is not to be read.
    """
    ranks = len(next(iter(table.matrices.values())).spans)
    comm = DryRunCommunicator(rank, ranks)
    arrays = [
        (name, mx.zeros(part.shape, empty.sources[name].dtype))
        for name, part in table.slices(rank).items()
    ]
    empty.model.update(tree_unflatten(arrays))
    empty.sources.clear()
    parallelize(empty.model, table, comm)
    return comm


class RankRuns:
    """The dry runs of one rank, for whatever contexts.

    `empty` becomes the model of that rank.
    """

    def __init__(
        self, empty: EmptyModel, table: SliceTable, rank: int, *, batch: int
    ) -> None:
        self._comm = become_rank(empty, table, rank)
        self._model, self._batch = empty.model, batch
        self._held = sum(a.nbytes for _, a in tree_flatten(self._model.parameters()))
        record_calls(self._model, self._comm.script.calls)
        self._operations: list[int] = []

    def at(self, context: int) -> DryRun:
        """Read a prompt of `context` - 1 tokens as mlx-lm reads it, and a token.

        Nothing is evaluated.
        """
        model, comm, batch = self._model, self._comm, self._batch
        caches = make_prompt_cache(model)
        *before, last = chunks(context - 1)
        chunk: tuple[Step, ...] = ()
        for tokens in [sum(before), last]:
            if tokens:
                comm.script.take()
                with outputs_unread():
                    model(mx.zeros((batch, tokens), mx.int32), cache=caches)
                chunk = comm.script.take()
        token = _token(model, comm, batch, caches)
        if not self._operations:
            comm.counts_operations = True
            counted = _token(model, comm, batch, make_prompt_cache(model))
            self._operations = [step.operations for step in counted]
            comm.counts_operations = False
        token = tuple(
            replace(step, operations=operations)
            for step, operations in zip(token, self._operations, strict=True)
        )
        return DryRun(self._held, tuple(map(_size, caches)), chunk or token, token)


def _token(
    model: nn.Module, comm: DryRunCommunicator, batch: int, caches: Any
) -> tuple[Step, ...]:
    logits = model(mx.zeros((batch, 1), mx.int32), cache=caches)
    operations = comm.count_operations(logits) if comm.counts_operations else 0
    comm.script.end_step(Step(operations=operations))
    return comm.script.take()


def chunks(tokens: int) -> list[int]:
    """The lengths of the chunks in which mlx-lm reads a prompt of `tokens` tokens."""
    whole, rest = divmod(tokens, CHUNK_TOKENS)
    return [CHUNK_TOKENS] * whole + ([rest] if rest or not whole else [])


def _size(cache: Any) -> CacheSize:
    arrays = [x for _, x in tree_flatten(_arrays(cache)) if isinstance(x, mx.array)]
    with_tokens = [x for x in arrays if x.ndim == 4]
    return CacheSize(
        sum(x.nbytes for x in arrays),
        max((x.shape[2] for x in with_tokens), default=0),
        sum(x.shape[3] for x in with_tokens),
    )


def _arrays(cache: Any) -> Any:
    """All that a cache holds, with the room that it keeps for more tokens."""
    if hasattr(cache, "caches"):
        return [_arrays(inner) for inner in cache.caches]
    return [x for x in vars(cache).values() if isinstance(x, mx.array | list | tuple)]

"""The layers that communicate. Each wraps a layer of MLX that holds one shard.

A column-parallel layer needs no class: it is the layer itself with fewer outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import base
from mlxtp.layers.sums import Sum, are_outputs_unread
from mlxtp.partition.spans import Span, Spans


class RowParallelLinear(nn.Module):
    """Multiply a sharded input by a row shard and sum over ranks.

    y = allreduce(x_r @ W_r.T) + b, where W_r holds rank r's columns of W. Where the
    sum is made later, with those of other layers, y is partial.

    A quantized W is cut between groups. Where a rank's inputs begin or end
    inside one (`spans` and `covered`), W_r holds the group whole and x_r is
    filled up with zeros, which add nothing.

    Shapes: x_r (..., in_r) sharded -> y (..., out) replicated, or partial.
    Communicates: one allreduce of (...)*out elements, or nothing if partial.
    """

    def __init__(
        self,
        linear: nn.Module,
        comm: Communicator,
        spans: Spans = Spans(),  # noqa: B008
        covered: Spans = Spans(),  # noqa: B008
        sum_over_ranks: Sum | None = None,
    ) -> None:
        """Wrap `linear`, which holds W_r, a matrix or one for each expert.

        Without `sum_over_ranks`, which makes the sum, y stays partial.
        """
        super().__init__()
        inner = base(linear)
        if "bias" in inner and sum_over_ranks is not None:
            self.bias = inner.pop("bias")
            inner.bias = None  # which some layers ask for
        elif "bias" in inner:
            # Added once: the partial outputs are summed later.
            inner.bias = inner.bias * (comm.rank == 0)
        self.linear = linear
        self._sum = sum_over_ranks
        self._sources = _fill_up(spans, covered) if spans != covered else None

    def __call__(self, x: mx.array, *which: mx.array, **options: Any) -> mx.array:
        """Multiply; `which` and `options` go to the layer of several experts."""
        if self._sources is not None:
            zero = mx.zeros((*x.shape[:-1], 1), x.dtype)
            x = mx.concatenate([x, zero], axis=-1)[..., mx.array(self._sources)]
        y = self.linear(x, *which, **options)
        if self._sum is not None:
            y = self._sum(y)
        return y + self.bias if "bias" in self else y


class RowParallelDoRA(RowParallelLinear):
    """A row-parallel layer under DoRA, whose norms run over all ranks' columns.

    y = m / |W + s B A| * allreduce(x_r @ (W_r + s B A_r).T) + b, with the norm of
    every row of W. (DoRA: Liu et al., 2024, arXiv:2402.09353.)

    Shapes: x_r (..., in_r) sharded -> y (..., out) replicated, or partial.
    Communicates: what `RowParallelLinear` does, and once an allreduce of out elements.
    """

    def __init__(
        self,
        dora: nn.Module,
        comm: Communicator,
        spans: Spans,
        covered: Spans,
        sum_over_ranks: Sum | None = None,
    ) -> None:
        """Wrap `dora`, mlx-lm's layer, which holds W_r."""
        bias = dora.linear.pop("bias", None)
        super().__init__(dora, comm, spans, covered, sum_over_ranks)
        if bias is not None:
            dora.linear.bias = None
            self.bias = bias if sum_over_ranks else bias * (comm.rank == 0)
        adapted = dora._dequantized_weight().astype(mx.float32)
        adapted = adapted + dora.scale * (dora.lora_b.T @ dora.lora_a.T)
        if self._sources is not None:  # columns that another rank has, too
            adapted = adapted * (mx.array(self._sources) >= 0)
        squares = comm.allreduce(mx.square(adapted).sum(axis=1))
        self.linear = _Scaled(dora, dora.m / mx.sqrt(squares))


class _Scaled(nn.Module):
    """The product of a DoRA layer, each output scaled: (..., in) -> (..., out)."""

    def __init__(self, dora: nn.Module, scale: mx.array) -> None:
        super().__init__()
        self.dora = dora
        self._scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        z = (x @ self.dora.lora_a) @ self.dora.lora_b
        y = self.dora.linear(x) + (self.dora.scale * z).astype(x.dtype)
        return y * self._scale.astype(x.dtype)


class InputGather:
    """Put inputs together of which every rank has a part.

    Shapes: x_r (..., in_r) sharded -> x (..., in) replicated.
    Communicates: one allgather of (...)*in elements.
    """

    def __init__(self, spans: Sequence[Spans], comm: Communicator, path: str) -> None:
        """Take all ranks' `spans` of the inputs of the layer at `path`."""
        order = [place for part in spans for place in part.indices]
        self._back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        self._sizes = [part.length for part in spans]
        self._comm, self._path = comm, path

    def __call__(self, x: mx.array) -> mx.array:
        """Gather this rank's part and the others'."""
        whole = self._comm.allgather(x, self._sizes, self._path)
        return whole[..., self._back]


class RowParallelQuantized(RowParallelLinear):
    """A row-parallel layer that quantizes its inputs in groups, of which some are cut.

    y = allreduce(Q(x)_g @ W_g.T), where g are the groups of the rank, each whole.

    Shapes: x_r (..., in_r) sharded -> y (..., out) replicated, or partial.
    Communicates: what `RowParallelLinear` does, and before it one allgather of
        (...)*in elements.
    """

    def __init__(
        self,
        linear: nn.Module,
        comm: Communicator,
        groups: Spans,
        sum_over_ranks: Sum | None,
        gather: InputGather,
    ) -> None:
        """Wrap `linear`, which holds the inputs `groups` of W."""
        super().__init__(linear, comm, sum_over_ranks=sum_over_ranks)
        self._groups = mx.array(groups.indices)
        self._gather = gather

    def __call__(self, x: mx.array, *which: mx.array, **options: Any) -> mx.array:
        """Gather, quantize and multiply."""
        x = self._gather(x)[..., self._groups]
        return super().__call__(x, *which, **options)


class RowParallelRotated(RowParallelLinear):
    """A row-parallel layer whose inputs are rotated in blocks (Hadamard).

    y = allreduce(H(x)_r @ W_r.T), where H mixes the inputs within each block. Blocks
    of which several ranks have a part are put together first.

    Shapes: x_r (..., in_r) sharded -> y (..., out) replicated, or partial.
    Communicates: what `RowParallelLinear` does, and where blocks are cut, before it
        one allgather of (...)*in elements.
    """

    def __init__(
        self,
        linear: nn.Module,
        comm: Communicator,
        spans: Sequence[Spans],
        covered: Sequence[Spans],
        sum_over_ranks: Sum | None,
        rotate: Callable[..., mx.array],
        is_aligned: bool,
        path: str,
    ) -> None:
        """Wrap `linear`; `spans` and `covered` are those of all ranks.

        With `is_aligned` every rank has whole blocks, and rotates them itself.
        """
        mine = spans[comm.rank]
        super().__init__(linear, comm, mine, covered[comm.rank], sum_over_ranks)
        if is_aligned:
            linear.signs = linear.signs[mx.array(mine.indices)]
            return
        self._mine = mine.indices
        self._gather = InputGather(spans, comm, path)
        self._rotate, self._block, self._signs = rotate, linear.block, linear.signs
        linear.block = 0

    def __call__(self, x: mx.array, *which: mx.array, **options: Any) -> mx.array:
        """Rotate and multiply."""
        if not self.linear.block:
            whole = self._rotate(self._gather(x), self._block, self._signs)
            x = whole[..., mx.array(self._mine)]
        return super().__call__(x, *which, **options)


def _fill_up(spans: Spans, covered: Spans) -> list[int]:
    """For every place in `covered`: which element of x_r is there, -1 for a zero."""
    offsets = spans.offsets
    return [offsets.get(place, -1) for place in covered.indices]


class VocabParallel(nn.Module):
    """What layers share that hold `spans[rank]` of the vocabulary's rows.

    No cache depends on logits: in a call whose outputs nobody reads they are zeros.
    """

    def __init__(self, comm: Communicator, spans: Sequence[Span], path: str) -> None:
        """Take all ranks' rows, and where the model has the layer."""
        super().__init__()
        self.comm = comm
        self._sizes = [span.length for span in spans]
        self._path = path

    def _gather(self, logits: mx.array) -> mx.array:
        """(..., V_r) sharded -> (..., V) replicated."""
        if are_outputs_unread():
            return mx.zeros((*logits.shape[:-1], sum(self._sizes)), logits.dtype)
        return self.comm.allgather(logits, self._sizes, self._path)


class VocabParallelLinear(VocabParallel):
    """Multiply by a shard of the vocabulary's rows and gather all logits.

    y = allgather(x @ W_r.T), where W_r holds rank r's rows of W.

    Shapes: x (..., D) replicated -> y (..., V) replicated.
    Communicates: one allgather of (...)*V elements; nothing while nobody reads them.
    """

    def __init__(
        self, linear: nn.Module, comm: Communicator, spans: Sequence[Span], path: str
    ) -> None:
        """Wrap `linear`, which holds W_r."""
        super().__init__(comm, spans, path)
        self.linear = linear

    @property
    def weight(self) -> mx.array:
        """This rank's rows: models look at the dtype."""
        return self.linear.weight

    def __call__(self, x: mx.array) -> mx.array:
        """Make the logits of the rank's rows and gather all."""
        return self._gather(self.linear(x))


class VocabParallelEmbedding(VocabParallel):
    """Look tokens up where they are held and sum over ranks.

    y = allreduce(E[token] where the rank holds it, else 0); partial where the sum is
    made later. A token that no rank holds has no row: y is NaN, on every number of
    ranks. (MLX reads whatever lies in memory there.)

    Shapes: tokens (B, L) replicated -> y (B, L, D) replicated, or partial.
    Communicates: one allreduce of B*L*D elements, or nothing if partial; as a tied
        head (`as_linear`) what `VocabParallelLinear` does.
    """

    def __init__(
        self,
        embedding: nn.Module,
        comm: Communicator,
        spans: Sequence[Span],
        path: str,
        sum_over_ranks: Sum | None,
    ) -> None:
        """Wrap `embedding`, which holds this rank's rows."""
        super().__init__(comm, spans, path)
        self.embedding = embedding
        self._span = spans[comm.rank]
        self._sum = sum_over_ranks

    def __call__(self, tokens: mx.array) -> mx.array:
        """Look up the rows of tokens."""
        start, stop = self._span
        held = (tokens >= start) & (tokens < stop)
        rows = self.embedding(mx.where(held, tokens - start, 0))
        rows = mx.where(held[..., None], rows, self._elsewhere(tokens, rows.dtype))
        return self._sum(rows) if self._sum is not None else rows

    def _elsewhere(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array | float:
        """What this rank gives for tokens whose rows it does not hold.

        Zero, but NaN from the first rank for negative tokens, and from the last for
        those beyond all rows.

        Shapes: tokens (B, L) -> (B, L, 1), or one number for all.
        """
        start, stop = self._span
        is_first, is_last = start == 0, stop == sum(self._sizes)
        if is_first and is_last:
            return mx.nan
        if not is_first and not is_last:
            return 0.0
        has_no_row = tokens < 0 if is_first else tokens >= stop
        return mx.where(has_no_row, mx.nan, 0).astype(dtype)[..., None]

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the embedding: x (..., D) -> logits (..., V) replicated."""
        return self._gather(self.embedding.as_linear(x))

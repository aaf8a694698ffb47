"""The layers that communicate. Each wraps a layer of MLX that holds one shard.

A column-parallel layer needs no class: it is the layer itself with fewer outputs.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxtp.communicator import Communicator
from mlxtp.partition import Span


class Communicating(nn.Module):
    """A layer that communicates.

    While `unread` is set, nobody looks at the layer's output: it does not
    communicate, and what it returns is right in its shape alone. `path` is where
    the model has it.
    """

    unread: bool = False
    path: str = ""


class RowParallelLinear(Communicating):
    """Multiply a sharded input by a row shard and sum over ranks.

    y = allreduce(x_r @ W_r.T) + b, where W_r holds rank r's columns of W.

    A quantized W is cut between groups. Where a rank's inputs begin or end
    inside one (`spans` and `covered`), W_r holds the group whole and x_r is
    filled up with zeros, which add nothing.

    Shapes: x_r (..., in_r) sharded -> y (..., out) replicated.
    Communicates: one allreduce of (...)*out elements.
    """

    def __init__(
        self,
        linear: nn.Module,
        comm: Communicator,
        spans: Sequence[Span] = (),
        covered: Sequence[Span] = (),
    ) -> None:
        """Wrap `linear`, which holds W_r; its bias, if any, moves up here."""
        super().__init__()
        inner = linear.linear if "linear" in linear else linear
        if "bias" in inner:
            self.bias = inner.pop("bias")
        self.linear = linear
        self.comm = comm
        self._sources = _fill_up(spans, covered) if tuple(spans) != covered else None

    def __call__(self, x: mx.array) -> mx.array:
        if self._sources is not None:
            zero = mx.zeros((*x.shape[:-1], 1), x.dtype)
            x = mx.concatenate([x, zero], axis=-1)[..., mx.array(self._sources)]
        y = self.linear(x)
        if not self.unread:
            y = self.comm.allreduce(y, self.path)
        return y + self.bias if "bias" in self else y


def _fill_up(spans: Sequence[Span], covered: Iterable[Span]) -> list[int]:
    """For every place in `covered`: which element of x_r is there, -1 for a zero."""
    places = [place for start, stop in spans for place in range(start, stop)]
    index = {place: number for number, place in enumerate(places)}
    held = [place for start, stop in covered for place in range(start, stop)]
    return [index.get(place, -1) for place in held]


class VocabParallel(Communicating):
    """What layers share that hold `spans[rank]` of the vocabulary's rows."""

    def __init__(self, comm: Communicator, spans: Sequence[Span]) -> None:
        super().__init__()
        self.comm = comm
        self._sizes = [stop - start for start, stop in spans]

    def _gather(self, logits: mx.array) -> mx.array:
        """(..., V_r) sharded -> (..., V) replicated."""
        if self.unread:
            return mx.zeros((*logits.shape[:-1], sum(self._sizes)), logits.dtype)
        return self.comm.allgather(logits, self._sizes, self.path)


class VocabParallelLinear(VocabParallel):
    """Multiply by a shard of the vocabulary's rows and gather all logits.

    y = allgather(x @ W_r.T), where W_r holds rank r's rows of W.

    Shapes: x (..., D) replicated -> y (..., V) replicated.
    Communicates: one allgather of (...)*V elements.
    """

    def __init__(
        self, linear: nn.Module, comm: Communicator, spans: Sequence[Span]
    ) -> None:
        super().__init__(comm, spans)
        self.linear = linear

    def __call__(self, x: mx.array) -> mx.array:
        return self._gather(self.linear(x))


class VocabParallelEmbedding(VocabParallel):
    """Look tokens up where they are held and sum over ranks.

    y = allreduce(E[token] where the rank holds it, else 0).

    Shapes: tokens (B, L) replicated -> y (B, L, D) replicated.
    Communicates: one allreduce of B*L*D elements; as a tied head
    (`as_linear`) what `VocabParallelLinear` does.
    """

    def __init__(
        self, embedding: nn.Module, comm: Communicator, spans: Sequence[Span]
    ) -> None:
        super().__init__(comm, spans)
        self.embedding = embedding
        self._span = spans[comm.rank]

    def __call__(self, tokens: mx.array) -> mx.array:
        start, stop = self._span
        held = (tokens >= start) & (tokens < stop)
        rows = self.embedding(mx.where(held, tokens - start, 0))
        return self.comm.allreduce(mx.where(held[..., None], rows, 0), self.path)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._gather(self.embedding.as_linear(x))


class EmptyLinear(nn.Module):
    """Stands for a row-parallel layer of which the rank holds nothing.

    MLX's quantized kernels take no matrix without elements; what makes x is not
    evaluated either, for nobody looks at it.

    Shapes: x (..., 0) sharded -> zeros (..., out) partial.
    Communicates: nothing.
    """

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out

    def __call__(self, x: mx.array) -> mx.array:
        return mx.zeros((*x.shape[:-1], self.out), x.dtype)

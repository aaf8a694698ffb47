"""Prompts read in two halves: while the sums of one travel, the other computes.

Each half is a call of the model, the second behind the first, so caches and masks of
all kinds are those of a prompt that is read in two parts. What the calls send takes
turns (`Communicator.take_turns`): the second half is always one collective behind, and
what it needs of a cache the first has left there.

(ISO: Xiao et al., 2024, arXiv:2409.11155.)
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxtp.generation.rollback import tokens_at_once
from mlxtp.layers.sums import outputs_unread

# Less is read whole: two calls of a few tokens cost about as much as two of many.
LEAST_TOKENS = 64

# The least that is worth measuring for, which takes as long as some hundred tokens.
MEASURED_FROM = 512

# What is measured: computing with so few and so many tokens, and allreduces of as many
# bytes as so many tokens send. Longer ones take little longer.
COMPUTED_TOKENS = 16, 64
SENT_TOKENS = 64, 512
TURNS = 2

# Halves have to take less than this part of the time.
WORTH = 0.95


@dataclass(frozen=True)
class Line:
    """Seconds that grow with the number of tokens."""

    base: float
    token: float

    @classmethod
    def through(cls, lengths: tuple[int, int], seconds: Sequence[float]) -> "Line":
        """Draw it through the seconds that two lengths have taken."""
        (few, many), (less, more) = lengths, seconds
        token = max(more - less, 0.0) / (many - few)
        return cls(max(less - few * token, 0.0), token)

    def at(self, tokens: float) -> float:
        """Return the seconds of so many tokens."""
        return self.base + tokens * self.token


@dataclass(frozen=True)
class Costs:
    """What a pass over a part of a prompt takes, on the slowest rank.

    Args:
        computing: all that is not communication.
        travelling: its collectives.
        two: the collectives of two such passes that take turns.
        collectives: how many a pass has.
    """

    computing: Line
    travelling: Line
    two: Line
    collectives: int

    def whole(self, tokens: int) -> float:
        """Seconds of a pass over all tokens at once."""
        return self.computing.at(tokens) + self.travelling.at(tokens)

    def halves(self, tokens: int) -> float:
        """Seconds of a pass in halves.

        Either all is computed without a pause, or all travels without one, or each half
        waits for what it has sent, and the other computes meanwhile. To that comes what
        the second half does in the end alone: one collective and what leads to it.
        """
        computing, travelling = (
            line.at(tokens / 2) for line in (self.computing, self.travelling)
        )
        alone = computing + travelling
        both = max(2 * computing, self.two.at(tokens / 2), alone)
        return both + alone / self.collectives

    def pay(self, tokens: int) -> bool:
        """Whether halves are worth it."""
        return self.halves(tokens) < WORTH * self.whole(tokens)


def read_in_halves(
    call: Callable[..., mx.array], model: nn.Module, tokens: mx.array, **options: Any
) -> mx.array:
    """Call a model on both halves of `tokens`.

    Args:
        call: of the model, or of one that is changed.
        model: as `mlxtp.load` returns it.
        tokens: (B, L) with L > 1.
        options: of the calls, `cache` among them.

    Returns: logits (B, L, V).
    Communicates: what two calls do.
    """
    half = (tokens.shape[1] + 1) // 2
    logits = model.comm.take_turns(
        lambda: call(tokens[:, :half], **options),
        lambda: call(tokens[:, half:], **options),
    )
    return mx.concatenate(logits, axis=1)


class Halves:
    """Calls of one model that read prompts: in halves where that pays.

    Whether it does is measured once for a model, with the first part of a prompt that
    has `MEASURED_FROM` tokens, or by `costs` before: what a pass takes without its
    collectives, and what they take. Ranks of one host send through its memory: there it
    is the processor that is busy, nothing travels, and nothing is measured.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a split model, as `mlxtp.load` returns it."""
        self._model = model

    def __call__(
        self, call: Callable[..., mx.array], tokens: mx.array, **options: Any
    ) -> mx.array:
        """Call the model, by `call`, on tokens (B, L).

        Communicates: what the call does, or two calls of halves; the first time what
        `measure` does.
        """
        length = tokens.shape[1]
        is_known = hasattr(self._model, "pass_costs")
        # Whatever else a call is given goes with its tokens: nobody knows how.
        if length < (LEAST_TOKENS if is_known else MEASURED_FROM) or (
            options.keys() != {"cache"}
        ):
            return call(tokens, **options)
        # What a window with first tokens hides depends on where a pass begins.
        if tokens_at_once(options["cache"]) < length:
            return call(tokens, **options)
        costs = self.costs()
        if costs is None or not costs.pay(tokens.size):
            return call(tokens, **options)
        return read_in_halves(call, self._model, tokens, **options)

    def costs(self) -> Costs | None:
        """Return what was measured, or measure it; None where nothing can be hidden.

        It is the model's and the cluster's, and no call's: the model keeps it.
        """
        if not hasattr(self._model, "pass_costs"):
            self._model.pass_costs = measure(self._model)
        return self._model.pass_costs


def measure(model: nn.Module) -> Costs | None:
    """Measure what passes of a model take; None where nothing can be hidden.

    Communicates: those of a pass of few tokens, a few allreduces, and three allgathers
    of objects.
    """
    comm = model.comm
    if not comm.takes_turns or len(set(comm.allgather_object(comm.host))) == 1:
        return None

    def read(tokens: int) -> None:
        caches = make_prompt_cache(model)
        with outputs_unread():
            model(mx.zeros((1, tokens), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])

    tokens = COMPUTED_TOKENS[0]
    calls, nbytes = comm.traffic.calls, comm.traffic.bytes
    read(tokens)
    calls, nbytes = comm.traffic.calls - calls, comm.traffic.bytes - nbytes
    if not calls:
        return None
    # Of one collective; what ranks gather differs in size.
    token_bytes = max(comm.allgather_object(nbytes)) // (calls * tokens)

    def part(tokens: int) -> mx.array:
        return mx.zeros(token_bytes * tokens // mx.float32.size)

    def allreduce(tokens: int) -> None:
        mx.eval(comm.allreduce(part(tokens)))

    def two_allreduces(tokens: int) -> None:
        x, y = part(tokens), part(tokens)
        mx.eval(comm.take_turns(lambda: comm.allreduce(x), lambda: comm.allreduce(y)))

    with comm.dry_run():
        computing = _seconds(read, COMPUTED_TOKENS)
    one, two = (_seconds(work, SENT_TOKENS) for work in (allreduce, two_allreduces))
    of_ranks = comm.allgather_object((computing, one, two))
    computing, one, two = np.max(of_ranks, axis=0).tolist()
    return Costs(
        Line.through(COMPUTED_TOKENS, computing),
        Line.through(SENT_TOKENS, [calls * seconds for seconds in one]),
        Line.through(SENT_TOKENS, [calls * seconds for seconds in two]),
        calls,
    )


def _seconds(work: Callable[[int], None], lengths: tuple[int, int]) -> list[float]:
    """Seconds that something takes with two numbers of tokens: the least of turns."""
    turns = []
    for _ in range(TURNS):
        marks = [time.perf_counter()]
        for tokens in lengths:
            work(tokens)
            marks.append(time.perf_counter())
        turns.append(np.diff(marks))
    return np.min(turns, axis=0).tolist()

"""Prompts read in two halves: while the sums of one travel, the other computes.

Each half is a call of the model, the second behind the first, so caches and masks of
all kinds are those of a prompt that is read in two parts. What the calls send takes
turns (`Communicator.take_turns`): the second half is always one collective behind, and
what it needs of a cache the first has left there.

(ISO: Xiao et al., 2024, arXiv:2409.11155.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxtp.layers.sums import outputs_unread

# Types whose tokens are others where a prompt is read in parts, or which hide nothing.
WHOLE: dict[str, str] = {}

# Less is read whole: two calls of a few tokens cost about as much as two of many.
LEAST_TOKENS = 64

# What is measured is a pass of so many tokens each.
FEW_TOKENS, MANY_TOKENS = 16, 64
TURNS = 2

# Halves have to take less than this part of the time.
WORTH = 0.95


@dataclass(frozen=True)
class Line:
    """Seconds that grow with the number of tokens."""

    base: float
    token: float

    @classmethod
    def through(cls, few: float, many: float) -> "Line":
        """Draw it through what `FEW_TOKENS` and `MANY_TOKENS` have taken."""
        token = max(many - few, 0.0) / (MANY_TOKENS - FEW_TOKENS)
        return cls(max(few - FEW_TOKENS * token, 0.0), token)

    def at(self, tokens: float) -> float:
        """Return the seconds of so many tokens."""
        return self.base + tokens * self.token


@dataclass(frozen=True)
class Costs:
    """What a pass over a part of a prompt takes, on the slowest rank.

    Args:
        computing: all that is not communication.
        travelling: all of its collectives.
        collectives: how many there are.
    """

    computing: Line
    travelling: Line
    collectives: int

    def whole(self, tokens: int) -> float:
        """Seconds of a pass over all tokens at once."""
        return self.computing.at(tokens) + self.travelling.at(tokens)

    def halves(self, tokens: int) -> float:
        """Seconds of a pass in halves.

        What takes longer hides the rest, but for what the first half computes before
        its first collective, and the second sends in its last.
        """
        computing = 2 * self.computing.at(tokens / 2)
        travelling = 2 * self.travelling.at(tokens / 2)
        hidden = min(computing, travelling)
        return max(computing, travelling) + hidden / (2 * max(self.collectives, 1))

    def pay(self, tokens: int) -> bool:
        """Whether halves are worth it."""
        return self.halves(tokens) < WORTH * self.whole(tokens)


def reason_against_halves(model: nn.Module) -> str | None:
    """Say why a model's prompts are read whole; None if they need not be.

    Args:
        model: a split model, as `mlxtp.load` returns it.
    """
    if (reason := WHOLE.get(getattr(model, "model_type", ""))) is not None:
        return reason
    return None if model.comm.takes_turns else "nothing travels while a rank computes"


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
    parts = tokens[:, :half], tokens[:, half:]
    logits = model.comm.take_turns(
        [lambda part=part: call(part, **options) for part in parts]
    )
    return mx.concatenate(logits, axis=1)


class Halves:
    """Calls of one model that read prompts: in halves where that pays.

    Whether it does is measured once for a model, with the first part of a prompt that
    has `LEAST_TOKENS`: what a pass takes without its collectives, and what they take.
    Ranks of one host send through its memory: there it is the processor that is busy,
    nothing travels, and nothing is measured.
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
        # Whatever else a call is given goes with its tokens: nobody knows how.
        if length < LEAST_TOKENS or options.keys() != {"cache"}:
            return call(tokens, **options)
        costs = self.costs()
        if costs is None or not costs.pay(length):
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

    Communicates: those of a pass of few tokens, a few allreduces, and two allgathers of
    objects.
    """
    comm = model.comm
    if reason_against_halves(model) is not None:
        return None
    if len(set(comm.allgather_object(comm.host))) == 1:
        return None

    def read(tokens: int) -> None:
        caches = make_prompt_cache(model)
        with outputs_unread():
            model(mx.zeros((1, tokens), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])

    calls, nbytes = comm.traffic.calls, comm.traffic.bytes
    read(FEW_TOKENS)
    calls, nbytes = comm.traffic.calls - calls, comm.traffic.bytes - nbytes
    if not calls:
        return None

    def allreduce(tokens: int) -> None:
        itemsize = mx.float32.size
        x = mx.zeros(nbytes * tokens // (FEW_TOKENS * calls * itemsize))
        mx.eval(comm.allreduce(x))

    lengths = FEW_TOKENS, MANY_TOKENS
    with comm.dry_run():
        mine = [_seconds(read, tokens) for tokens in lengths]
    mine += [calls * _seconds(allreduce, tokens) for tokens in lengths]
    slowest = [max(column) for column in zip(*comm.allgather_object(mine), strict=True)]
    return Costs(Line.through(*slowest[:2]), Line.through(*slowest[2:]), calls)


def _seconds(work: Callable[[int], None], tokens: int) -> float:
    """Seconds that something takes with so many tokens: the least of some turns."""
    seconds = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        work(tokens)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

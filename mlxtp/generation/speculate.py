"""One stream with drafts: several tokens for one pass, and those of the model alone.

A pass reads the tokens that are known and the drafts behind them. At each place the
model's token is drawn as it is drawn without drafts, and drafts are accepted as long as
they are the same. Then the caches are taken back to the last token that is right.
"""

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler

from mlxtp.comm.communicator import Communicator
from mlxtp.generation.agreed import agreed
from mlxtp.generation.drafts import Drafts
from mlxtp.generation.drawing import normalized
from mlxtp.generation.pays import Costs, DraftLength
from mlxtp.generation.rollback import ANY, MOST_PENDING, Point, tokens_at_once
from mlxtp.generation.sampling import draw, tokens_in

# Rank 0 tells what rounds cost in trials, when a number of drafted tokens is new, and
# after every so many rounds.
TELL_ROUNDS = 32
# Of so many passes in a row without drafts the mean time is taken: the wait for one is
# partly that for the next.
MEASURED_TOGETHER = 8
# Between so many tokens MLX keeps the memory that it does not need any more.
CLEAR_TOKENS = 256


class DrawnToken(NamedTuple):
    """A token, its log-probabilities (V,), and whether it was drafted."""

    token: int
    logprobs: mx.array
    from_draft: bool


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Args:
        sampler: log-probabilities (1, V) -> tokens (1,).
        processors: mlx-lm's, which change logits by the tokens before.
        seed: draws follow from it and the position; None draws from MLX's stream.
        start: how many tokens of the sequence come before those that are given.
    """

    sampler: Sampler = greedy_sampler
    processors: Sequence[LogitsProcessor] = ()
    seed: int | None = None
    start: int = 0

    @property
    def is_repeatable(self) -> bool:
        """Whether what is drawn at a place does not depend on what else is drawn."""
        return self.sampler is greedy_sampler or self.seed is not None

    def draw(self, logprobs: mx.array, position: int) -> mx.array:
        """Draw the token that comes behind `position` tokens: (1, V) -> (1,)."""
        if self.seed is None or self.sampler is greedy_sampler:
            return self.sampler(logprobs)
        return draw(self.sampler, logprobs, self.seed, self.start + position)


class Speculation:
    """A sequence that goes on with drafts, alike on every rank.

    Args:
        model: as `mlxtp.load` gives it, or a twin of it.
        comm: its ranks.
        drafts: what drafts.
        caches: the model's, which hold nothing of `prompt`. All of it is read into them
            but for the last token (`read`).
        prompt: tokens (L,).
        drawing: how tokens are drawn.
        ends: tokens that end the text: none is looked for behind one.
        fixed: how many tokens are drafted; None for as many as pay.
        quantized: mlx-lm's kv_bits, kv_group_size, quantized_kv_start.
        chunk: the most tokens of a prompt that are read at once.
        stream: MLX's, on which all is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        drafts: Drafts,
        caches: list[Any],
        prompt: Sequence[int],
        drawing: Drawing,
        *,
        ends: Container[int],
        fixed: int | None,
        quantized: Mapping[str, Any],
        chunk: int,
        stream: Any,
    ) -> None:
        self._model, self._comm, self._caches = model, comm, caches
        self._drawing, self._ends = drawing, ends
        draw_alike = drawing.draw if drawing.is_repeatable else None
        self._drafter = drafts.begin(draw_alike, chunk)
        self._chunk = chunk
        self._rows = model.slice_table.vocabulary_rows
        self._agree = agreed(lambda tokens: tokens, comm)
        self._quantized = quantized
        self._stream = stream
        self._tokens = list(prompt)  # all that are known
        self._held = len(self._tokens) - 1  # so many are in the caches
        self._given = len(self._tokens)  # so many the caller has
        # Where the caches stood before the pass of a round, and how many they held.
        self._point, self._held_at_point = Point([]), 0
        self._costs = Costs()  # by this rank's clock
        self._is_fixed = fixed is not None
        self._pays = DraftLength(self._costs, fixed)
        self._rounds = 0
        self._told: set[int] = set()  # numbers of drafted tokens
        self._is_warm = False  # whether the drafter has read all but the last tokens

    def read(self, progress: Callable[[int, int], None]) -> None:
        """Read the prompt in chunks; `progress` is told of it, as mlx-lm does it."""
        total = len(self._tokens)
        progress(0, total)
        for begin in range(0, total - 1, self._chunk):
            end = min(begin + self._chunk, total - 1)
            with mx.stream(self._stream):
                self._model(mx.array([self._tokens[begin:end]]), cache=self._caches)
                self._quantize()
                mx.eval([cache.state for cache in self._caches])
            progress(end, total)
            mx.clear_cache()
        progress(total, total)

    def tokens(self, most: int) -> Iterator[DrawnToken]:
        """Yield `most` tokens, or without end for -1."""
        made = 0
        while made != most:
            left = most - made if most > 0 else ANY
            plain = min(self._pays.plain_passes, left)
            if tokens_at_once(self._caches) == 1:
                plain = left
            for drawn in self._plain(plain) if plain else self._round(left):
                made += 1
                self._given += 1
                if made % CLEAR_TOKENS == 0:
                    mx.clear_cache()
                yield drawn

    def finish(self) -> None:
        """Bring the caches to the tokens that were given: to all of them, and no more.

        The caller may have left in the middle of a round. What has to be read is put
        into MLX's graph and not evaluated (over "mpi-eager" it is, in part).

        Communicates: what a pass does, where the caches lack a token.
        """
        del self._tokens[self._given :]
        surplus = self._held - self._given
        if surplus > 0:
            was_cut = self._point.take_back(surplus)
            self._held = self._given if was_cut else self._held_at_point
        with mx.stream(self._stream):
            if self._pending:
                self._model(mx.array([self._pending]), cache=self._caches)
                self._held = self._given
            self._quantize()

    @property
    def _pending(self) -> list[int]:
        """The tokens that the caches lack."""
        return self._tokens[self._held :]

    def _plain(self, passes: int) -> Iterator[DrawnToken]:
        """Make passes without drafts, each begun before the last token is known."""
        self._costs.renew_plain()
        begin = time.perf_counter()
        history = self._history()
        position = len(self._tokens)
        inputs = mx.array(self._pending, mx.uint32)
        following = self._begin(inputs, history, position)
        times: list[float] = []
        for number in range(passes):
            y, logprobs = following
            if number + 1 < passes:
                if history is not None:
                    history = mx.concatenate([history, y])
                following = self._begin(y, history, position + number + 1)
            token = _value(y)
            self._tokens.append(token)
            # What was begun is in the caches: only the last token is not.
            self._held = len(self._tokens) - (number + 1 == passes)
            if number:  # the first fills the pipeline
                times.append(time.perf_counter() - begin)
            if len(times) == MEASURED_TOGETHER or (times and number + 1 == passes):
                self._costs.add_plain(fmean(times))
                times.clear()
            yield DrawnToken(token, logprobs[0], False)
            begin = time.perf_counter()
        self._is_warm = False
        self._pays.passed(passes)
        self._tell_costs()

    def _begin(
        self, inputs: mx.array, history: mx.array | None, position: int
    ) -> tuple[mx.array, mx.array]:
        """Begin a pass; the token (1,) that it draws and log-probabilities (1, V)."""
        with mx.stream(self._stream):
            logits = self._model(inputs[None], cache=self._caches)[:, -1]
            self._quantize()
            token, logprobs = self._draw_one(logits, history, position)
            token = self._agree(token)
            mx.async_eval(token, logprobs)  # type: ignore[no-untyped-call]
        return token, logprobs

    def _round(self, left: int) -> Iterator[DrawnToken]:
        """Draft, make a pass, and draw up to `left` tokens."""
        begin = time.perf_counter()
        wanted = min(self._pays.count, self._room(left))
        with mx.stream(self._stream):
            proposed = self._drafts_of(wanted) if wanted > 0 else None
            drafted = proposed or []
            # Not of a pass without drafts: a window would be copied to be kept.
            self._point = Point(self._caches if drafted else [])
            self._held_at_point = self._held
            inputs = mx.array([*self._pending, *drafted], mx.uint32)
            logits = self._model(inputs[None], cache=self._caches)[0]
            drawn, logprobs = self._draw(logits[-1 - len(drafted) :], drafted)
            accepted = len(drawn) - 1
            self._tokens += drawn
            if self._point.take_back(len(drafted) - accepted):
                self._held = len(self._tokens) - 1
        if proposed is not None:
            seconds = self._note(len(drafted), time.perf_counter() - begin)
            self._pays.judged(len(drafted), accepted, seconds)
        for place, token in enumerate(drawn):
            yield DrawnToken(token, logprobs[place], place < accepted)
        # All are given, and nothing goes back any more: caches that are quantized now
        # are other ones.
        self._point = Point([])
        with mx.stream(self._stream):
            self._quantize()

    def _note(self, drafted: int, seconds: float) -> float | None:
        """Note what a round took; by rank 0's clock, where it tells that, or None."""
        is_new = False
        if self._is_warm:  # else the drafter had to read what it had not
            self._costs.add(drafted, seconds)
            is_new = drafted not in self._told
        self._is_warm = True
        self._rounds += 1
        is_told = is_new or self._pays.is_on_trial or self._rounds % TELL_ROUNDS == 0
        if not is_told:
            return None
        if is_new:
            self._told.add(drafted)
        return self._tell_costs(seconds)

    def _drafts_of(self, count: int) -> list[int] | None:
        """Draft at most `count` tokens, up to one that the model has no row for.

        None while the drafter reads a prompt.
        """
        drafted = self._drafter.propose(self._tokens, count)
        if drafted is None:
            return None
        return list(takewhile(lambda token: token < self._rows, drafted))

    def _room(self, left: int) -> int:
        """How many tokens can be drafted at most."""
        if len(self._pending) > MOST_PENDING:
            return 0
        at_once = tokens_at_once(self._caches)
        start, offset = self._quantized["quantized_kv_start"], tokens_in(self._caches)
        if self._quantized["kv_bits"] is not None and offset < start:
            # Tokens behind it find quantized what is before it.
            at_once = min(at_once, start - offset)
        return min(left - 1, at_once - len(self._pending))

    def _draw(
        self, logits: mx.array, drafted: Sequence[int]
    ) -> tuple[list[int], list[mx.array]]:
        """Draw tokens up to the first that was not drafted, or that ends the text.

        Logits (K + 1, V) for K drafted tokens. Returns the tokens, and the
        log-probabilities (V,) of each.
        """
        known = len(self._tokens)
        if not self._drawing.processors:
            # Nothing depends on what is drawn before: all are drawn at once.
            x = normalized(logits)
            together: Any = self._agree(self._drawn_together(x, known)).tolist()
            right = 0
            while self._goes_on(together[right], drafted[right : right + 1]):
                right += 1
            return together[: right + 1], list(x[: right + 1])
        drawn: list[int] = []
        logprobs: list[mx.array] = []
        for place, row in enumerate(mx.split(logits, len(logits))):
            history = mx.array([*self._tokens, *drawn])
            token, x = self._draw_one(row, history, known + place)
            drawn.append(_value(self._agree(token)))
            logprobs.append(x[0])
            if not self._goes_on(drawn[-1], drafted[place : place + 1]):
                break
        return drawn, logprobs

    def _drawn_together(self, logprobs: mx.array, position: int) -> mx.array:
        """Draw the tokens of places in a row: (K + 1, V) -> (K + 1,)."""
        if self._drawing.sampler is greedy_sampler:
            return greedy_sampler(logprobs)
        rows = mx.split(logprobs, len(logprobs))
        return mx.concatenate(
            [self._drawing.draw(x, position + place) for place, x in enumerate(rows)]
        )

    def _draw_one(
        self, logits: mx.array, history: mx.array | None, position: int
    ) -> tuple[mx.array, mx.array]:
        """Draw a token: logits (1, V) -> the token (1,), log-probabilities (1, V)."""
        for processor in self._drawing.processors:
            logits = processor(history, logits)
        logprobs = normalized(logits)
        return self._drawing.draw(logprobs, position), logprobs

    def _goes_on(self, token: int, drafted: Sequence[int]) -> bool:
        """Whether what was drafted behind a drawn token may be right: it was drafted.

        `drafted` is the draft at its place, empty behind the last.
        """
        return list(drafted) == [token] and token not in self._ends

    def _history(self) -> mx.array | None:
        """The tokens (L,) that processors look at; None without processors."""
        return mx.array(self._tokens) if self._drawing.processors else None

    def _quantize(self) -> None:
        maybe_quantize_kv_cache(self._caches, **self._quantized)

    def _tell_costs(self, seconds: float = 0.0) -> float:
        """Give every rank the costs by rank 0's clock, and its seconds of a round.

        Communicates: one broadcast of MOST + 3 elements.
        """
        if self._is_fixed or self._comm.size == 1:
            return seconds
        with mx.stream(self._stream):
            mine = mx.array([seconds, *self._costs.to_floats()])
            told: Any = self._comm.bcast(mine, at="what drafts cost").tolist()
        self._pays.costs = Costs.from_floats(told[1:])
        return float(told[0])


def _value(token: mx.array) -> int:
    """The number of a token (1,)."""
    value: Any = token.item()
    return int(value)

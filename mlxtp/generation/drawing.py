"""How the next token is drawn from logits, as mlx-lm does it, and what it scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import TokenBuffer
from mlx_lm.sample_utils import (
    LogitsProcessor,
    Sampler,
    make_logits_processors,
    make_sampler,
)

from mlxtp.generation.settings import Settings

# Below it logits that are divided by the temperature leave the range of float16.
LEAST_TEMPERATURE = 1e-3


def normalized(logits: mx.array) -> mx.array:
    """Normalize logits as mlx-lm does: (..., V) -> (..., V)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Score:
    """The log-probability of a token, and those of the likeliest, in their order."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of N tokens, unevaluated.

    Shapes: chosen (N,); the likeliest `top` and their `logprobs` (N, n).
    """

    chosen: mx.array
    top: mx.array
    logprobs: mx.array

    @classmethod
    def of(cls, logits: mx.array, tokens: mx.array, n: int) -> "Scores":
        """Take those of tokens (N,), and the n likeliest, of logits (N, V)."""
        x = normalized(logits.astype(mx.float32))
        chosen = mx.take_along_axis(x, tokens[:, None].astype(mx.int32), -1)[:, 0]
        n = min(n, x.shape[-1])
        top = mx.argpartition(-x, n - 1, -1)[:, :n] if n else mx.zeros((len(x), 0))
        top = top.astype(mx.int32)
        return cls(chosen, top, mx.take_along_axis(x, top, -1))

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated."""
        return [self.chosen, self.top, self.logprobs]

    def evaluated(self) -> list[Score]:
        """Return the scores, one for each token."""
        lists: list[Any] = [x.tolist() for x in self.arrays]
        return [
            Score(x, sorted(zip(*pairs, strict=True), key=lambda pair: -pair[1]))
            for x, *pairs in zip(*lists, strict=True)
        ]


class Processors:
    """Penalties and biases of one request, as mlx-lm computes them."""

    def __init__(
        self, settings: Settings, tokens: Sequence[int], generated: Sequence[int]
    ) -> None:
        every = 1 << 31  # tokens count however long ago they were
        recent = settings.repetition_context_size
        if recent is not None:
            tokens = tokens[len(tokens) - len(generated) - 1 :]
        self._bias = make_logits_processors(dict(settings.logit_bias))
        self._of_all: list[LogitsProcessor] = []
        if settings.repetition_penalty != 1:
            self._of_all = make_logits_processors(
                repetition_penalty=settings.repetition_penalty,
                repetition_context_size=recent or every,
            )
        self._of_generated = make_logits_processors(
            presence_penalty=settings.presence_penalty,
            presence_context_size=every,
            frequency_penalty=settings.frequency_penalty,
            frequency_context_size=every,
        )
        self._all = TokenBuffer(list(tokens) if self._of_all else None)
        self._generated = TokenBuffer(list(generated) if self._of_generated else None)
        self.any = bool(self._bias or self._of_all or self._of_generated)

    def add(self, token: int) -> None:
        """Note a token that was drawn."""
        if self._of_all:
            self._all.update_and_fetch(mx.array([token], mx.int32))
        if self._of_generated:
            self._generated.update_and_fetch(mx.array([token], mx.int32))

    def __call__(self, logits: mx.array, more: Sequence[int] = ()) -> mx.array:
        """Change the logits of the token behind `more`, which are not noted.

        Shapes: logits (1, V) -> (1, V).
        """
        if not self.any:
            return logits
        logits = mx.array(logits)  # mlx-lm's processors change theirs in place
        for processors, noted in (
            (self._bias, self._all),
            (self._of_all, self._all),
            (self._of_generated, self._generated),
        ):
            tokens = noted.tokens
            if more and processors:
                tokens = mx.concatenate([tokens, mx.array([*more], mx.int32)])
            for processor in processors:
                logits = processor(tokens, logits)
        return logits


def samplers(rows: int, never_excluded: Sequence[int]) -> Callable[[Settings], Sampler]:
    """Make samplers of `rows` tokens; settings that draw alike share one."""

    @lru_cache
    def made(*arguments: float) -> Sampler:
        temperature, top_p, top_k, min_p, xtc_probability, xtc_threshold = arguments
        return make_sampler(
            temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            top_p,
            min_p,
            top_k=int(top_k) if top_k < rows else 0,
            xtc_probability=xtc_probability,
            xtc_threshold=xtc_threshold,
            xtc_special_tokens=list(never_excluded),
        )

    return lambda x: made(
        *(x.temperature, x.top_p, x.top_k),
        *(x.min_p, x.xtc_probability, x.xtc_threshold),
    )

"""Random numbers that follow from a seed and a position, and from nothing else."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList
from mlx_lm.sample_utils import Sampler, greedy_sampler


class PositionSampler:
    """A sampler of mlx-lm whose draws follow from `seed` and the token's position.

    The position of a token is the number of tokens before it in its sequence. So a
    text does not depend on what else drew random numbers, on drafts, on the other
    sequences of a batch, or on where it was interrupted. MLX's own stream of random
    numbers is left as it was.

    mlx-lm calls logits processors once for each row, with the tokens before it, and
    then samples the rows: `note_position` has to be among the processors.

    Args:
        sampler: log probabilities (B, V) -> tokens (B,); draws from MLX's stream.
        seed: 64 bits, the same on all ranks.
        start: the position of the first token that is drawn. mlx-lm's loops differ in
            which tokens of the prompt they show to processors. None where they show
            all, as a batch does.
    """

    def __init__(self, sampler: Sampler, seed: int, start: int | None = None) -> None:
        self._sampler, self._seed, self._start = sampler, seed, start
        self._hidden = None if start is not None else 0
        self._positions: list[int] = []

    def note_position(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Note how many tokens (L,) are before the next one; return the logits."""
        if self._hidden is None:
            assert self._start is not None
            self._hidden = self._start - len(tokens)
        self._positions.append(self._hidden + len(tokens))
        return logits

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw a token for each row whose position was noted: (B, V) -> (B,)."""
        positions, self._positions = self._positions, []
        rows = zip(positions, mx.split(logprobs, len(positions)), strict=True)
        return mx.concatenate(
            [draw(self._sampler, row, self._seed, position) for position, row in rows]
        )


def draw(sampler: Sampler, logprobs: mx.array, seed: int, position: int) -> mx.array:
    """Draw a token by seed and position, whatever else draws: (1, V) -> (1,).

    mlx-lm's samplers take MLX's stream of random numbers, which is left as it was. They
    run as they stand: compiled, each new temperature or top_p would be a program of its
    own, which takes a second and stays for ever.
    """
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    mx.random.seed(_mixed(seed, position))
    mx.disable_compile()
    try:
        return sampler(logprobs)
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
        mx.random.seed(high << 32 | low)


def _mixed(seed: int, position: int) -> int:
    """64 bits that differ for each pair of seed and position."""
    pair = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest(), "little")


def seeded(
    options: Mapping[str, Any], seed: int | None, start: int | None = None
) -> dict[str, Any]:
    """Let the `sampler` among mlx-lm's options draw by `seed` and position.

    Options stay as they are without a seed, or where nothing is drawn. For `start` see
    `PositionSampler`.
    """
    sampler = options.get("sampler")
    if seed is None or sampler in (None, greedy_sampler):
        return dict(options)
    by_position = PositionSampler(sampler, seed, start)
    processors = [
        *(options.get("logits_processors") or []),
        by_position.note_position,
    ]
    return {**options, "sampler": by_position, "logits_processors": processors}


def tokens_in(caches: Iterable[Any] | None) -> int:
    """The number of tokens that prompt caches hold.

    0 for those that do not say so: states of recurrent layers alone.
    """
    return max(
        (
            tokens_in(cache.caches)
            if isinstance(cache, CacheList)
            else getattr(cache, "offset", 0)
            for cache in caches or ()
        ),
        default=0,
    )

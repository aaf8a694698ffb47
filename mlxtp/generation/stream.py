"""Streaming text from a split model."""

from collections.abc import Generator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp.generation.agreed import agreed
from mlxtp.generation.halves import Halves
from mlxtp.generation.prompt import check_tokens, tokens_of
from mlxtp.generation.sampling import seeded, tokens_in
from mlxtp.layers.forward import Forward, change_forward, twin
from mlxtp.layers.sums import outputs_unread


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | list[int],
    *,
    seed: int | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text on every rank: `mlx_lm.stream_generate`, with its arguments.

    While mlx-lm reads the prompt it wants the caches and no logits, and says so
    between its steps: the layers that no cache depends on do not communicate then.
    That is known to this stream alone: streams of one model may take turns. Long parts
    of the prompt are read in halves where that is faster (`generation.halves`).

    Every rank samples for itself, from the same logits. With a `seed` what a `sampler`
    draws follows from the seed and the position of the token alone. Without one it
    draws from MLX's stream, which needs the same `mx.random.seed` on all ranks.
    Where machines differ, rank 0's tokens are taken (`mlxtp.agreed`).

    Args:
        model: as `mlxtp.load` gives it.
        tokenizer: the model's.
        prompt: text, or tokens (L,).
        seed: 64 bits, the same on every rank.
        kwargs: those of `mlx_lm.stream_generate`, such as `max_tokens`.

    Yields: mlx-lm's responses, one for each token.

    Raises: ValueError for a token of the prompt that the model has no row for.
    """
    tokens = tokens_of(prompt, tokenizer)
    check_tokens(tokens, model.slice_table.vocabulary_rows, tokenizer)
    start = tokens_in(kwargs.get("prompt_cache")) + len(tokens)
    kwargs = seeded(kwargs, seed, start)
    kwargs["sampler"] = agreed(kwargs.get("sampler"), model.comm)
    told = kwargs.pop("prompt_progress_callback", None)
    reads_prompt, halves = False, Halves(model)

    def progress(processed: int, total: int) -> None:
        nonlocal reads_prompt
        # The last token of a prompt is a step of its own, whose logits are read.
        reads_prompt = processed < total - 1
        if told is not None:
            told(processed, total)

    def call(former: Forward, model: nn.Module, *args: Any, **options: Any) -> mx.array:
        if not reads_prompt:
            return former(model, *args, **options)
        with outputs_unread():
            return halves(partial(former, model), *args, **options)

    stream = twin(model)
    change_forward(stream, call)
    yield from mlx_lm.stream_generate(
        stream,
        tokenizer,
        mx.array(tokens),
        prompt_progress_callback=progress,
        **kwargs,
    )

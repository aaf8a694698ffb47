"""Streaming text from a split model."""

from collections.abc import Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp.layers.parallel import Communicating, VocabParallel


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | list[int],
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text on every rank: `mlx_lm.stream_generate`, with its arguments.

    While mlx-lm reads the prompt it wants the caches and no logits, and says so
    between its steps: the layers that no cache depends on stay silent then.

    Every rank samples for itself, from the same logits. A `sampler` that draws
    needs the same `mx.random.seed` on all of them.
    """
    silent = behind_the_caches(model)
    told = kwargs.pop("prompt_progress_callback", None)

    def progress(processed: int, total: int) -> None:
        # The last token of a prompt is a step of its own, whose logits are read.
        for layer in silent:
            layer.unread = processed < total - 1
        if told is not None:
            told(processed, total)

    try:
        yield from mlx_lm.stream_generate(
            model, tokenizer, prompt, prompt_progress_callback=progress, **kwargs
        )
    finally:
        for layer in silent:
            layer.unread = False


def behind_the_caches(model: nn.Module) -> list[Communicating]:
    """The layers that communicate what no cache depends on.

    They are those at the end of the last layer's blocks, and the head.
    """
    silent = [m for m in model.modules() if isinstance(m, VocabParallel)]
    if not model.slice_table.family.loops:
        last = (m for m in model.layers[-1].modules() if isinstance(m, Communicating))
        silent += [m for m in last if not m.inner]
    return silent

"""Streaming text from a split model."""

import sys
import time
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import (
    DEFAULT_QUANTIZED_KV_START,
    GenerationResponse,
    generation_stream,
    wired_limit,
)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp.generation.agreed import agreed
from mlxtp.generation.choices import DRAFT_LENGTH
from mlxtp.generation.drafts import Drafts, drafts_of
from mlxtp.generation.halves import Halves
from mlxtp.generation.prompt import check_tokens, tokens_of
from mlxtp.generation.sampling import seeded, tokens_in
from mlxtp.generation.speculate import Drawing, DrawnToken, Speculation
from mlxtp.layers.forward import Forward, change_forward, twin
from mlxtp.layers.sums import outputs_unread

# What mlx-lm's loop takes where nothing else is given.
PREFILL_STEP = 2048


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | list[int],
    *,
    seed: int | None = None,
    draft_model: nn.Module | Drafts | str | None = None,
    num_draft_tokens: int | Literal["auto"] = "auto",
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
        draft_model: what drafts: "ngram", for what followed the last tokens before; a
            model of the same tokens, split as `mlxtp.load` splits it; or what
            `mlxtp.generation.drafts` makes, such as a model that is whole on a rank.
            The tokens are those of `model` alone, whatever drafts.
        num_draft_tokens: how many tokens are drafted for a pass, from 1 to 16, or
            "auto" for as many as pay.
        kwargs: those of `mlx_lm.stream_generate`, such as `max_tokens`. A
            `prompt_cache` is the model's alone. It holds prompt and text when the
            stream ends, or is left (closed), on all ranks behind the same token.

    Yields: mlx-lm's responses, one for each token.

    Raises: ValueError for a token of the prompt that the model has no row for; for
        drafts, or a number of them, that do not exist.
    """
    tokens = tokens_of(prompt, tokenizer)
    check_tokens(tokens, model.slice_table.vocabulary_rows, tokenizer)
    start = tokens_in(kwargs.get("prompt_cache"))
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
    kwargs["prompt_progress_callback"] = progress
    if draft_model is not None:
        wanted, is_allowed = DRAFT_LENGTH
        if not is_allowed(num_draft_tokens):
            raise ValueError(
                f"num_draft_tokens is {num_draft_tokens!r}: wanted {wanted}"
            )
        drafts = drafts_of(draft_model, model.comm)
        fixed = None if num_draft_tokens == "auto" else num_draft_tokens
        yield from _with_drafts(
            stream, tokenizer, tokens, drafts, fixed, seed=seed, start=start, **kwargs
        )
        return
    kwargs = seeded(kwargs, seed, start + len(tokens))
    kwargs["sampler"] = agreed(kwargs.get("sampler"), model.comm)
    yield from mlx_lm.stream_generate(stream, tokenizer, mx.array(tokens), **kwargs)


def _with_drafts(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    drafts: Drafts,
    fixed: int | None,
    *,
    seed: int | None,
    start: int,
    prompt_progress_callback: Any,
    max_tokens: int = 256,
    sampler: Any = None,
    logits_processors: Any = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = PREFILL_STEP,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    stream: Any = generation_stream,
) -> Iterator[GenerationResponse]:
    """Generate with drafts; arguments are those of `stream_generate`.

    A `prompt_cache` holds all tokens of prompt and text when the last was given, or
    when the caller leaves.
    """
    if max_tokens == 0:
        raise ValueError("max_tokens is 0: wanted a number of tokens, or -1 for all")
    quantized = {
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "quantized_kv_start": quantized_kv_start,
    }
    caches = prompt_cache
    if caches is None:
        caches = make_prompt_cache(model, max_kv_size)
    speculation = Speculation(
        *(model, model.comm, drafts, caches, prompt),
        Drawing(sampler or greedy_sampler, logits_processors or (), seed, start),
        ends=tokenizer.eos_token_ids,
        fixed=fixed,
        quantized=quantized,
        chunk=prefill_step_size,
        stream=stream,
    )
    with wired_limit(model, [stream]):
        begin = time.perf_counter()
        speculation.read(prompt_progress_callback)
        drawn = speculation.tokens(max_tokens)
        try:
            yield from _responses(drawn, tokenizer, len(prompt), max_tokens, begin)
        except GeneratorExit:
            # By an exception a rank may leave alone: it is not to wait for the others.
            # What nobody closes is closed when Python ends, behind MPI.
            if prompt_cache is not None and not sys.is_finalizing():
                speculation.finish()
            raise
        if prompt_cache is not None:
            speculation.finish()
            mx.eval([cache.state for cache in prompt_cache])


def _responses(
    drawn: Iterator[DrawnToken],
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    max_tokens: int,
    begin: float,
) -> Iterator[GenerationResponse]:
    """Make mlx-lm's responses of tokens, up to one that ends the text.

    `begin` is when the prompt began to be read.
    """
    detokenizer = tokenizer.detokenizer
    for number, each in enumerate(drawn, start=1):
        now = time.perf_counter()
        if number == 1:
            prompt_tps = prompt_tokens / (now - begin)
            begin = now
        is_end = each.token in tokenizer.eos_token_ids
        if not is_end:
            detokenizer.add_token(each.token)
        is_last = is_end or number == max_tokens
        if is_last:
            detokenizer.finalize()
        yield GenerationResponse(
            text=detokenizer.last_segment,
            token=each.token,
            logprobs=each.logprobs,
            from_draft=each.from_draft,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tps,
            generation_tokens=number,
            generation_tps=number / (time.perf_counter() - begin),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=("stop" if is_end else "length") if is_last else None,
        )
        if is_last:
            return

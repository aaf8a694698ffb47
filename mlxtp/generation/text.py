"""Whole texts from a split model: of one prompt, or of several in a batch."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import BatchResponse, GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp.generation.agreed import agreed
from mlxtp.generation.halves import Halves
from mlxtp.generation.prompt import check_tokens
from mlxtp.generation.sampling import seeded
from mlxtp.generation.stream import stream_generate
from mlxtp.layers.forward import Forward, change_forward, twin


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | list[int],
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a text on every rank: `mlx_lm.generate`, with its arguments.

    Args:
        model: as `mlxtp.load` gives it.
        tokenizer: the model's.
        prompt: text, or tokens (L,).
        verbose: print the text as it is made, and figures behind it, on rank 0.
        kwargs: those of `mlxtp.stream_generate`, `seed` among them.
    """
    show = verbose and model.comm.rank == 0
    text = ""
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if show:
            print(response.text, end="", flush=True)
    if show:
        print(f"\n{figures(response)}\nPeak memory: {response.peak_memory:.3f} GB")
    return text


def batch_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    verbose: bool = False,
    *,
    seed: int | None = None,
    **kwargs: Any,
) -> BatchResponse:
    """Generate for several prompts at once: `mlx_lm.batch_generate`, on every rank.

    Prompts may differ in length. The tokens are those that mlx-lm makes of this batch
    in one process. With a `seed` each sequence gets the tokens that it gets alone.

    Args:
        model: as `mlxtp.load` gives it, of a type that mlx-lm can batch.
        tokenizer: the model's.
        prompts: B prompts, each tokens (L,).
        verbose: print progress and figures on rank 0.
        seed: 64 bits, the same on every rank, as in `mlxtp.stream_generate`. In a batch
            positions are counted from each prompt's first token.
        kwargs: those of `mlx_lm.batch_generate`, such as `max_tokens`, one number or
            one for each prompt, and `return_token_ids`.

    Raises: ValueError if mlx-lm has no batched cache for the type; for a token that the
        model has no row for; for a `seed` with `prompt_caches`.
    """
    for prompt in prompts:
        check_tokens(prompt, model.slice_table.vocabulary_rows, tokenizer)
    if seed is not None and kwargs.get("prompt_caches"):
        raise ValueError(
            "mlx-lm does not say how many tokens the prompt_caches of a batch hold: "
            "leave out the seed, or give whole prompts"
        )
    kwargs = seeded(kwargs, seed)
    show = verbose and model.comm.rank == 0
    kwargs["sampler"] = agreed(kwargs.get("sampler"), model.comm)
    halves = Halves(model)

    def call(former: Forward, model: nn.Module, *args: Any, **options: Any) -> mx.array:
        return halves(partial(former, model), *args, **options)

    batch = twin(model)
    change_forward(batch, call)
    return mlx_lm.batch_generate(batch, tokenizer, prompts, verbose=show, **kwargs)


def figures(response: GenerationResponse) -> str:
    """Describe how many tokens a finished stream had, and how fast they came."""
    return (
        f"Prompt: {response.prompt_tokens} tokens, "
        f"{response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec"
    )

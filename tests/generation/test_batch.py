"""Prompts of unequal length in one batch, with every type that can be batched."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import zoo
from equal import Tokens
from every_type import LONG, PROMPT, REPRESENTATIVES, RUNNABLE, for_types, split
from kept import kept
from metal_kernels import use_plain_operations
from mlx_lm.generate import BatchResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer
from reference import on_rank_0
from saved_types import saved
from tiny import save_tokenizer

import mlxtp
from mlxtp import Communicator

use_plain_operations()

# Longer than the windows of `zoo`, 8 tokens, several times; a little longer; shorter;
# and one token alone. They end one by one, the second after its window has wrapped.
PROMPTS = [LONG[:61], LONG[61:84], PROMPT[:5], PROMPT[5:6]]
STEPS = [3, 9, 4, 6]


@pytest.fixture(scope="session")
def tokenizer(comm: Communicator, shared_path: Path) -> TokenizerWrapper:
    """A tokenizer whose texts never end."""
    folder = shared_path / "endless"
    on_rank_0(comm, lambda: save_tokenizer(folder))
    result = load_tokenizer(folder)
    result.eos_token_ids = set()
    return result


def tokens(
    batch_generate: Callable[..., BatchResponse],
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    which: slice = slice(None),
) -> list[Tokens]:
    """The tokens of each prompt, which is read in chunks of 37."""
    scores = defaultdict(list)

    def record(context: mx.array, logits: mx.array) -> mx.array:
        scores[context[0].item()].append(logits[0])
        return logits

    response = batch_generate(
        model,
        tokenizer,
        PROMPTS[which],
        max_tokens=STEPS[which],
        prefill_step_size=37,
        return_token_ids=True,
        logits_processors=[record],
    )
    return [
        Tokens(tokens, scores[prompt[0]][: len(tokens)])
        for prompt, tokens in zip(PROMPTS[which], response.token_ids, strict=True)
    ]


# With some types whose batches mlx-lm refuses.
QUICK = [*REPRESENTATIVES, "gemma2", "phi3small", "gpt_bigcode"]


# What differs between worlds is how matrices are cut (families/test_every_type).
@for_types(RUNNABLE, QUICK, worlds=[3])
def test_equals_one_process(
    model_type: str, comm: Communicator, tokenizer: TokenizerWrapper
) -> None:
    folder = saved(model_type, comm)

    def alone() -> list[Tokens] | str:
        model, _ = load_model(folder)
        try:
            if model_type in zoo.BATCHED_HERE:
                rows = [slice(i, i + 1) for i in range(len(PROMPTS))]
                each = (
                    tokens(mlx_lm.batch_generate, model, tokenizer, one) for one in rows
                )
                return [*itertools.chain(*each)]
            return tokens(mlx_lm.batch_generate, model, tokenizer)
        except Exception as error:
            return str(error)

    expected = kept(comm, f"{model_type}-batch", lambda _: alone())
    model = split(model_type, comm)
    if (says := zoo.UNBATCHED.get(model_type)) is not None:
        assert says in expected
        with pytest.raises((ValueError, TypeError, AttributeError), match=says):
            tokens(mlxtp.batch_generate, model, tokenizer)
        return
    assert tokens(mlxtp.batch_generate, model, tokenizer) == expected
    assert list(map(len, expected)) == STEPS


def test_only_rank_0_shows_progress(
    comm: Communicator,
    tokenizer: TokenizerWrapper,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, _ = mlxtp.load_model(saved("llama", comm), comm)
    mlxtp.batch_generate(model, tokenizer, PROMPTS, verbose=True, max_tokens=2)
    shown = capsys.readouterr().out
    assert ("Generation: 8 tokens" in shown) == (comm.rank == 0)
    assert comm.rank == 0 or not shown

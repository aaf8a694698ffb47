"""Prompts of unequal length in one batch, with every type that mlx-lm can batch."""

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
) -> list[Tokens]:
    """The tokens of each prompt, which is read in chunks of 37."""
    scores = defaultdict(list)

    def record(context: mx.array, logits: mx.array) -> mx.array:
        scores[context[0].item()].append(logits[0])
        return logits

    response = batch_generate(
        model,
        tokenizer,
        PROMPTS,
        max_tokens=STEPS,
        prefill_step_size=37,
        return_token_ids=True,
        logits_processors=[record],
    )
    return [
        Tokens(tokens, scores[prompt[0]][: len(tokens)])
        for prompt, tokens in zip(PROMPTS, response.token_ids, strict=True)
    ]


@for_types(RUNNABLE, REPRESENTATIVES)
def test_equals_one_process(
    model_type: str, comm: Communicator, tokenizer: TokenizerWrapper
) -> None:
    folder = saved(model_type, comm)

    def alone() -> list[Tokens] | str:
        model, _ = load_model(folder)
        try:
            return tokens(mlx_lm.batch_generate, model, tokenizer)
        except Exception as error:
            return str(error)

    expected = kept(comm, f"{model_type}-batch", lambda _: alone())
    if isinstance(expected, str):
        assert zoo.UNBATCHED.get(model_type, "no error") in expected
        pytest.skip(f"not in mlx-lm either: {expected}")
    assert model_type not in zoo.UNBATCHED
    model = split(model_type, comm)
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

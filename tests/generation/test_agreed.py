"""Where machines differ, all ranks go on with rank 0's tokens."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from kept import kept_model
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.sample_utils import greedy_sampler, make_sampler
from reference import PROMPT

import mlxtp
from mlxtp import Communicator

STEPS = 8


@pytest.fixture(scope="module")
def model(comm: Communicator) -> Any:
    return mlxtp.load(kept_model(comm, "llama-8-4-tied"), comm)


@pytest.fixture
def unlike(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Ranks of other machines: samplers that draw otherwise on each of them."""
    monkeypatch.setattr(comm, "machines_differ", comm.size > 1)
    mx.random.seed(comm.rank)
    return make_sampler(temp=2.0)


def by_stream(
    comm: Communicator, model: Any, tokenizer: Any, **options: Any
) -> list[int]:
    responses = mlxtp.stream_generate(
        model, tokenizer, PROMPT, max_tokens=STEPS, **options
    )
    return [response.token for response in responses]


def by_drafts(
    comm: Communicator, model: Any, tokenizer: Any, **options: Any
) -> list[int]:
    return by_stream(comm, model, tokenizer, draft_model=model, **options)


def by_batch(
    comm: Communicator, model: Any, tokenizer: Any, **options: Any
) -> list[list[int]]:
    prompts = [PROMPT, PROMPT[:4]]
    return mlxtp.batch_generate(
        model, tokenizer, prompts, max_tokens=STEPS, return_token_ids=True, **options
    ).token_ids


def by_mlx_lm(
    comm: Communicator, model: Any, tokenizer: Any, **options: Any
) -> list[int]:
    """The loop of research code, which takes what `agreed` makes."""
    sampler = mlxtp.agreed(options.get("sampler"), comm)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=STEPS, sampler=sampler)
    return [token for token, _ in steps]


def by_batch_generator(
    comm: Communicator, model: Any, tokenizer: Any, **options: Any
) -> list[int]:
    sampler = mlxtp.agreed(options.get("sampler"), comm)
    batch = BatchGenerator(model, max_tokens=STEPS)
    batch.insert([PROMPT, PROMPT[:4]], samplers=[sampler, None])
    tokens = []
    while responses := batch.next_generated():
        tokens += [response.token for response in responses if response.uid == 0]
    return tokens


LOOPS = [by_stream, by_drafts, by_batch, by_mlx_lm, by_batch_generator]


@pytest.mark.parametrize("loop", LOOPS)
def test_all_ranks_go_on_with_the_tokens_of_rank_0(
    loop: Callable[..., Any], model: Any, unlike: Any, comm: Communicator
) -> None:
    tokens = loop(comm, *model, sampler=unlike)
    assert tokens
    assert all(others == tokens for others in comm.allgather_object(tokens))


def test_it_costs_a_collective_a_step_where_machines_differ(
    model: Any, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls() -> int:
        comm.traffic.reset()
        by_mlx_lm(comm, *model)
        return comm.traffic.calls

    alike = calls()
    assert mlxtp.agreed(None, comm) is greedy_sampler
    monkeypatch.setattr(comm, "machines_differ", comm.size > 1)
    # mlx-lm's loop samples once more than it gives tokens.
    assert calls() - alike == (STEPS + 1 if comm.size > 1 else 0)

"""The same seed, the same text: split, cut, behind a cache, with drafts, in a batch."""

import time
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from kept import kept, kept_model
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from reference import PROMPT

import mlxtp
from mlxtp import Communicator
from mlxtp.generation.sampling import PositionSampler, draw, seeded
from mlxtp.shard import shard

STEPS, SEED = 20, 7
# Each draws more than once for a token, and the second knows all tokens before it.
OPTIONS: dict[str, dict[str, float]] = {
    "warm": {"temp": 2.0},
    "xtc": {"temp": 3.0, "top_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05},
}
Loaded = tuple[nn.Module, TokenizerWrapper]


@pytest.fixture(scope="module")
def folder(comm: Communicator) -> Path:
    return kept_model(comm, "llama-8-4-tied")


@pytest.fixture(scope="module")
def loaded(comm: Communicator, folder: Path) -> Loaded:
    return endless(mlxtp.load(folder, comm))


def endless(loaded: Any) -> Loaded:
    """A model whose texts do not end."""
    loaded[1].eos_token_ids = set()
    return loaded


def drawn(loaded: Loaded, prompt: list[int], kind: str, **options: Any) -> list[int]:
    options = {"max_tokens": STEPS, "prefill_step_size": 4, "seed": SEED} | options
    sampler = make_sampler(**OPTIONS[kind])
    responses = mlxtp.stream_generate(*loaded, prompt, sampler=sampler, **options)
    return [response.token for response in responses]


def reference(comm: Communicator, folder: Path, kind: str) -> list[int]:
    """What mlx-lm draws in one process, by position."""

    def compute(_: Path) -> list[int]:
        options = {"sampler": make_sampler(**OPTIONS[kind]), "max_tokens": STEPS}
        options = seeded(options, SEED, len(PROMPT))
        loaded = endless(mlx_lm.load(str(folder)))
        responses = mlx_lm.stream_generate(*loaded, PROMPT, **options)
        return [response.token for response in responses]

    return kept(comm, f"drawn-{kind}", compute)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_text_follows_from_the_seed(
    kind: str, comm: Communicator, folder: Path, loaded: Loaded
) -> None:
    model, tokenizer = loaded
    expected = reference(comm, folder, kind)
    assert len(set(expected)) > 5
    assert drawn(loaded, PROMPT, kind) == expected
    assert drawn(loaded, PROMPT, kind, seed=SEED + 1) != expected
    # Read again up to the fifth token, all at once or behind what a cache holds.
    read = [*PROMPT, *expected[:5]]
    assert drawn(loaded, read, kind, max_tokens=STEPS - 5) == expected[5:]
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([read[:-3]]), cache=caches))
    rest = drawn(loaded, read[-3:], kind, prompt_cache=caches, max_tokens=STEPS - 5)
    assert rest == expected[5:]
    # In a batch, where the others' prompts and texts are longer and shorter.
    options = {"sampler": make_sampler(**OPTIONS[kind]), "return_token_ids": True}
    batch = mlxtp.batch_generate(
        model,
        tokenizer,
        [PROMPT[:2], PROMPT, [*PROMPT, *PROMPT]],
        max_tokens=[5, STEPS, 9],
        seed=SEED,
        **options,
    )
    assert batch.token_ids[1] == expected
    assert batch.token_ids[0] == drawn(loaded, PROMPT[:2], kind, max_tokens=5)


@pytest.mark.parametrize("kind", OPTIONS)
def test_drafts_change_no_text(
    kind: str, comm: Communicator, folder: Path, loaded: Loaded
) -> None:
    """Drafts are drawn with the numbers of their positions, so a good one is right."""
    expected = reference(comm, folder, kind)
    other, _ = mlxtp.load_model(kept_model(comm, "llama-8-8"), comm)
    for draft, number in [(other, 3), (other, 1), (loaded[0], 4)]:
        options = {"draft_model": draft, "num_draft_tokens": number}
        assert drawn(loaded, PROMPT, kind, **options) == expected
    sampler = make_sampler(**OPTIONS[kind])
    responses = mlxtp.stream_generate(
        *loaded, PROMPT, sampler=sampler, seed=SEED, max_tokens=STEPS, **options
    )
    accepted = [response.from_draft for response in responses]
    assert accepted.count(True) == STEPS * 4 // 5


def test_forms_of_a_checkpoint(
    comm: Communicator, folder: Path, shared_path: Path
) -> None:
    """Cut, and after who knows what else has drawn."""
    cut = shared_path / "drawn-cut"
    if comm.rank == 0:
        shard(folder, [1] * comm.size, cut)
    comm.barrier()
    mx.random.normal((3,))
    loaded = endless(mlxtp.load(cut, comm))
    assert drawn(loaded, PROMPT, "warm") == reference(comm, folder, "warm")


def test_mlx_s_stream_is_left_alone(loaded: Loaded, folder: Path) -> None:
    """A seeded text does not move it; without a seed samplers draw from it."""
    mx.random.seed(3)
    before = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    drawn(loaded, PROMPT, "warm")
    assert mx.random.normal((4,)).tolist() == before

    def from_stream() -> list[int]:
        mx.random.seed(5)
        return drawn(loaded, PROMPT, "warm", seed=None)

    assert from_stream() == from_stream() != drawn(loaded, PROMPT, "warm")


def test_rows_are_drawn_apart() -> None:
    """A row's draw is that of its position, whichever row it is."""
    logprobs = mx.zeros((1, 1000))
    sampler = PositionSampler(make_sampler(temp=1.0), SEED)

    def at(*positions: int) -> list[int]:
        for position in positions:
            sampler.note_position(mx.zeros(position), logprobs)
        return sampler(mx.repeat(logprobs, len(positions), axis=0)).tolist()

    assert at(3, 8, 3) == [*at(3), *at(8), *at(3)]
    assert len({token for position in range(40) for token in at(position)}) > 30


def test_a_seed_in_a_batch_behind_caches(loaded: Loaded) -> None:
    caches = [make_prompt_cache(loaded[0])]
    with pytest.raises(ValueError, match="leave out the seed"):
        mlxtp.batch_generate(*loaded, [PROMPT], seed=1, prompt_caches=caches)


@pytest.mark.parametrize("token", [131, -1])
def test_tokens_that_the_model_has_no_row_for(token: int, loaded: Loaded) -> None:
    message = f"token {token} of the prompt .* 131 rows, for tokens from 0 to 130"
    for prompt in [[3, token], mx.array([token, 3])]:
        with pytest.raises(ValueError, match=message):
            mlxtp.generate(*loaded, prompt)
    with pytest.raises(ValueError, match=message):
        mlxtp.batch_generate(*loaded, [[3], [3, token]])


@pytest.mark.once
def test_a_new_temperature_is_no_program_of_its_own() -> None:
    """To compile one for each would take seconds, and memory for good."""
    logprobs = mx.zeros((1, 50))
    begin = time.monotonic()
    for number in range(40):
        sampler = make_sampler(1 + number / 977, top_p=0.9)
        mx.eval(draw(sampler, logprobs, SEED, number))
    assert time.monotonic() - begin < 5
    # What others compile is compiled as before.
    graph = StringIO()
    mx.export_to_dot(graph, mx.compile(lambda x: mx.exp(x * 2))(logprobs))
    assert "CompiledBroadcastMultiplyExp" in graph.getvalue()

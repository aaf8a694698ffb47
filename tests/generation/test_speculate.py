"""One stream with drafts: the tokens of the model alone, whatever the options."""

import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from equal import Tokens
from every_type import LONG, split
from kept import kept, kept_model
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from reference import PROMPT, heads
from tiny import Tiny

import mlxtp
from mlxtp import Communicator
from mlxtp.generation import speculate
from mlxtp.generation.drafts import Drafts, ModelDrafts
from mlxtp.generation.sampling import tokens_in
from mlxtp.generation.speculate import Speculation
from mlxtp.layers.forward import change_forward, twin
from mlxtp.stories import PATH as STORIES

# Worlds of 2 and 5 add no case: what drafts is whole on a rank, or split like any.
pytestmark = pytest.mark.ranks(1, 3)

STEPS, SEED = 24, 7
Loaded = tuple[nn.Module, TokenizerWrapper]

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"sampler": make_sampler(1.5, top_p=0.9)},
    "penalties": {
        "sampler": make_sampler(1.5),
        "logits_processors": make_logits_processors(
            {3: 1.0}, repetition_penalty=1.3, frequency_penalty=0.5
        ),
    },
    "quantized": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 14},
    "rotating": {"max_kv_size": 12},
}


@pytest.fixture(scope="module")
def folder(comm: Communicator) -> Path:
    """A model whose caches can be quantized."""

    def save(folder: Path) -> Path:
        Tiny(heads(8, 4, head_dim=32, tie_word_embeddings=True)).save(folder)
        return folder

    return kept(comm, "llama-8-4-wide-heads", save)


@pytest.fixture(scope="module")
def loaded(comm: Communicator, folder: Path) -> Loaded:
    """A model whose texts do not end."""
    model, tokenizer = mlxtp.load(folder, comm)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def drafts(
    comm: Communicator, folder: Path, loaded: Loaded
) -> dict[str, Drafts | nn.Module | str]:
    """All that drafts: the model itself, which is often right, whole and split."""
    other, _ = mlxtp.load_model(kept_model(comm, "llama-8-8"), comm)
    whole, _ = mlxtp.load_model(folder, Communicator())
    root = comm.size - 1
    return {
        "ngram": "ngram",
        "one": ModelDrafts(whole if comm.rank == root else None, comm, root),
        "all": ModelDrafts(whole, comm),
        "split": loaded[0],
        "other": other,
    }


def made(loaded: Loaded, prompt: list[int], **options: Any) -> Tokens:
    options = {"max_tokens": STEPS, "prefill_step_size": 4, "seed": SEED} | options
    responses = mlxtp.stream_generate(*loaded, prompt, **options)
    return Tokens.of((said.token, said.logprobs) for said in responses)


@pytest.mark.parametrize("kind", OPTIONS)
def test_tokens_are_the_models_alone(
    kind: str, loaded: Loaded, drafts: dict[str, Any]
) -> None:
    """With every draft, of a fixed number of tokens and of as many as pay."""
    options = OPTIONS[kind]
    expected = made(loaded, PROMPT, **options)
    for draft in drafts.values():
        for number in (1, 5, "auto"):
            given = {"draft_model": draft, "num_draft_tokens": number}
            assert made(loaded, PROMPT, **options, **given) == expected


def test_a_text_ends_where_it_does(loaded: Loaded, drafts: dict[str, Any]) -> None:
    """In the middle of a draft that was right: what is behind it is not shown."""
    model, tokenizer = loaded
    expected = made(loaded, PROMPT)
    ending = TokenizerWrapper(tokenizer._tokenizer)
    ending.eos_token_ids = {expected[9]}
    options = {"draft_model": drafts["split"], "num_draft_tokens": 8}
    caches = make_prompt_cache(model)
    responses = list(
        mlxtp.stream_generate(
            *(model, ending, PROMPT), prompt_cache=caches, max_tokens=STEPS, **options
        )
    )
    count = expected.index(expected[9]) + 1
    assert [said.token for said in responses] == expected[:count]
    assert responses[-1].finish_reason == "stop"
    assert tokens_in(caches) == len(PROMPT) + count


def test_caches_go_on(loaded: Loaded, drafts: dict[str, Any]) -> None:
    """They hold all tokens when the last was given, and are drafted behind."""
    caches = make_prompt_cache(loaded[0])
    text: list[int] = []
    for prompt in (PROMPT, [3], [14, 15]):
        expected = made(
            loaded, [*PROMPT, *text, *prompt] if text else PROMPT, max_tokens=7
        )
        given = {"prompt_cache": caches, "max_tokens": 7}
        said = made(loaded, prompt, draft_model=drafts["ngram"], **given)
        assert said == expected
        text += [*(prompt if text else []), *said]
        assert tokens_in(caches) == len(PROMPT) + len(text)


def left(
    loaded: Loaded, prompt: list[int], count: int, **options: Any
) -> tuple[Tokens, int, Tokens]:
    """Leave a stream behind `count` tokens, and go on with its caches.

    Returns: the tokens that were given, how many the caches hold, and what follows.
    """
    caches = make_prompt_cache(loaded[0], options.pop("max_kv_size", None))
    of_drafts = options.keys() & {"draft_model", "num_draft_tokens"}
    drafts = {name: options.pop(name) for name in of_drafts}
    options = {"prefill_step_size": 4, "prompt_cache": caches, **options}
    stream = mlxtp.stream_generate(*loaded, prompt, **drafts, **options)
    said = Tokens.of((x.token, x.logprobs) for x in islice(stream, count))
    stream.close()
    held = tokens_in(caches)
    return said, held, made(loaded, [3], **{**options, "max_tokens": 4})


@pytest.mark.parametrize("kind", ["greedy", "quantized", "rotating"])
def test_a_caller_who_leaves_early(
    kind: str, loaded: Loaded, drafts: dict[str, Any]
) -> None:
    """In the middle of a round or at its end: the caches hold what was given."""
    for count in (1, 3, 4, 7):
        expected = left(loaded, PROMPT, count, **OPTIONS[kind])
        assert expected[1] == len(PROMPT) + count
        for draft in drafts.values():
            for number in (5, "auto"):
                given = {"draft_model": draft, "num_draft_tokens": number}
                got = left(loaded, PROMPT, count, **OPTIONS[kind], **given)
                assert got == expected


@pytest.mark.parametrize("model_type", ["gemma3_text", "mamba2", "qwen3_next"])
def test_a_caller_who_leaves_windows_and_states(
    model_type: str, comm: Communicator
) -> None:
    """Of drafts that are all right, and of some that are wrong."""
    model, tokenizer = split(model_type, comm), load_tokenizer(STORIES)
    tokenizer.eos_token_ids = set()
    for count in (1, 3, 5, 6):
        expected = left((model, tokenizer), LONG[:20], count)
        for draft in (model, "ngram"):
            given = {"draft_model": draft, "num_draft_tokens": 4}
            assert left((model, tokenizer), LONG[:20], count, **given) == expected


class Nothing:
    """Drafts that never propose anything."""

    def begin(self, *_: Any) -> "Nothing":
        return self

    def propose(self, tokens: list[int], count: int) -> list[int]:
        return []


class Interrupted(Nothing):
    """Drafts that somebody interrupts."""

    def propose(self, tokens: list[int], count: int) -> list[int]:
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["in a round", "by the caller", "at Python's end"])
def test_nothing_is_waited_for_behind_an_exception(
    how: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may leave alone: what it begins, nobody else comes to."""
    model, tokenizer = twin(loaded[0]), loaded[1]
    calls: list[int] = []

    def call(former: Any, model: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return former(model, *args, **options)

    change_forward(model, call)
    stream = mlxtp.stream_generate(
        *(model, tokenizer, PROMPT),
        prompt_cache=make_prompt_cache(model),
        draft_model=Interrupted() if how == "in a round" else Nothing(),
        num_draft_tokens=2,
    )
    if how == "in a round":
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert len(calls) == 1
        return
    next(stream)
    begun = len(calls)
    monkeypatch.setattr(sys, "is_finalizing", lambda: how == "at Python's end")
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", lambda *_: pytest.fail("waits for the others"))
        stream.close()
    # What the caches lack stands in the graph, where MPI is not yet over.
    assert len(calls) == begun + (how == "by the caller")


def test_a_draft_that_is_right_saves_passes(
    comm: Communicator, loaded: Loaded, drafts: dict[str, Any]
) -> None:
    """Rejected ones cost no wait besides; one on a rank costs a broadcast a round."""

    def calls(**options: Any) -> int:
        comm.traffic.reset()
        made(loaded, PROMPT, prefill_step_size=64, **options)
        return comm.traffic.calls

    one, two = (calls(max_tokens=n, draft_model=Nothing()) for n in (1, 2))
    rounds = STEPS // 6
    for where, extra in (("all", 0), ("one", rounds)):
        given = {"draft_model": drafts[where], "num_draft_tokens": 5}
        assert calls(**given) == one + (rounds - 1) * (two - one) + extra * (
            comm.size > 1
        )


def test_processors_see_the_tokens_that_come_before(
    loaded: Loaded, drafts: dict[str, Any]
) -> None:
    """All of the prompt and of the text, and no draft that was wrong."""

    def seen(**options: Any) -> list[list[int]]:
        calls: list[list[int]] = []

        def note(tokens: mx.array, logits: mx.array) -> mx.array:
            calls.append(tokens.tolist())  # type: ignore[arg-type]
            return logits

        made(loaded, PROMPT, logits_processors=[note], **options)
        return calls

    plain = seen()
    drafted = seen(draft_model=drafts["other"], num_draft_tokens=3)
    assert drafted == plain[: len(drafted)] and len(drafted) == STEPS


def test_the_prompt_is_read_without_the_layers_that_nobody_reads(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    list(
        mlxtp.stream_generate(
            *(*loaded, PROMPT),
            draft_model="ngram",
            max_tokens=2,
            prefill_step_size=3,
            prompt_progress_callback=lambda *counts: told.append(counts),
        )
    )
    total = len(PROMPT)
    steps = [*range(0, total - 1, 3), total - 1, total]
    assert told == [(done, total) for done in steps]


def test_ranks_that_differ_take_rank_0s_tokens(
    comm: Communicator, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what drafts cost by rank 0's clock, however their own runs."""
    counts: list[int] = []
    rounds = Speculation._round

    def noted(self: Speculation, left: int) -> Any:
        counts.append(self._pays.count)
        return rounds(self, left)

    monkeypatch.setattr(Speculation, "_round", noted)
    clock = iter(range(10_000))

    def seconds() -> float:
        return next(clock) * (1.0 + 7 * comm.rank) ** (next(clock) % 3)

    monkeypatch.setattr(speculate, "time", SimpleNamespace(perf_counter=seconds))
    tokens = made(loaded, PROMPT, draft_model=loaded[0], max_tokens=60)
    assert all(
        other == (tokens, counts) for other in comm.allgather_object((tokens, counts))
    )
    assert counts


def test_a_draft_of_more_tokens(loaded: Loaded) -> None:
    """What the model has no row for is not looked up, and nothing behind it."""

    class Beyond(Nothing):
        def propose(self, tokens: list[int], count: int) -> list[int]:
            return [1, 131, 2][:count]

    read: list[int] = []
    model = twin(loaded[0])

    def call(former: Any, model: nn.Module, tokens: mx.array, **options: Any) -> Any:
        read.extend(tokens[0].tolist())  # type: ignore[arg-type]
        return former(model, tokens, **options)

    change_forward(model, call)
    expected = made(loaded, PROMPT, max_tokens=6)
    options = {"draft_model": Beyond(), "num_draft_tokens": 3, "max_tokens": 6}
    assert made((model, loaded[1]), PROMPT, **options) == expected
    assert 131 not in read and read.count(1) >= 4


def test_options_that_are_none(loaded: Loaded) -> None:
    for options, error in (
        ({"max_tokens": 0}, ValueError),
        ({"input_embeddings": mx.zeros((3, 8))}, TypeError),
        ({"draft_model": "n-gram"}, ValueError),
    ):
        with pytest.raises(error):
            made(loaded, PROMPT, **{"draft_model": "ngram", **options})


@pytest.mark.parametrize("number", [0, -3, 17, 2.5, "x", None])
def test_numbers_of_drafts_that_are_none(number: Any, loaded: Loaded) -> None:
    """As the command line says it, and before the prompt is read."""

    def told(*_: int) -> None:
        pytest.fail("the prompt is read")

    given = {"draft_model": "ngram", "num_draft_tokens": number}
    with pytest.raises(ValueError, match=f"{number!r}: wanted auto, or from 1 to 16"):
        made(loaded, PROMPT, **given, prompt_progress_callback=told)

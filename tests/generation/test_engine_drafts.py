"""Rows that draft get the tokens that they get without: all of them, and no others.

`test_engine.py` does it with all model types.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from driven import GREEDY, Driven
from foretold import Foretold
from metal_kernels import use_plain_operations
from mlx_lm.utils import load_tokenizer

import mlxtp
from mlxtp import Communicator
from mlxtp.generation.draft_lengths import DraftLengths
from mlxtp.generation.drafts import NgramDrafts
from mlxtp.generation.grammar import Grammars
from mlxtp.generation.step import GenerationRequest
from mlxtp.stories import PATH as STORIES

# Worlds of 2 and 5 add no case: what drafts is whole on a rank, or split like any.
pytestmark = pytest.mark.ranks(1, 3)

use_plain_operations()

TOKENIZER = load_tokenizer(STORIES)
PEOPLE = {
    "kind": "schema",
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}},
        "required": ["name"],
        "additionalProperties": False,
    },
}
SETTINGS = {
    "greedy": GREEDY,
    "warm": replace(GREEDY, temperature=0.9, seed=3),
    "top": replace(GREEDY, temperature=1.1, seed=4, top_p=0.8, top_k=20, min_p=0.01),
    "scores": replace(GREEDY, logprobs=3),
    "penalties": replace(
        GREEDY,
        temperature=0.7,
        seed=6,
        repetition_penalty=1.3,
        presence_penalty=35.0,  # what is biased comes once, soon
        frequency_penalty=0.4,
        logit_bias={7: 30.0, 9: 31.0, 11: -100.0},
    ),
    "grammar": replace(GREEDY, temperature=0.9, seed=5, grammar=PEOPLE),
}
ENDS = TOKENIZER.eos_token_ids


@pytest.fixture(scope="module")
def model(comm: Communicator) -> nn.Module:
    """The one that ships, in float32."""
    model, _ = mlxtp.load(STORIES, comm)
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="module")
def grammars(model: nn.Module) -> Grammars:
    """Of that model's tokenizer."""
    return Grammars(TOKENIZER, model.slice_table.vocabulary_rows)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """A prompt that repeats itself."""
    text = "Once upon a time a girl named Mia lived by the sea with her dog. " * 20
    return TOKENIZER.encode(text)[:220]


def submit_all(driven: Driven, prompt: Sequence[int]) -> None:
    """Hand in a request of each of the settings, one after another."""
    for number, (name, settings) in enumerate(SETTINGS.items()):
        part = prompt[number : 40 + 9 * number]
        driven.submit(name, part, settings, max_tokens=12)
        driven.pass_()


@pytest.fixture(scope="module")
def plain(
    model: nn.Module, grammars: Grammars, prompt: list[int], comm: Communicator
) -> Driven:
    """All of these without drafts."""
    driven = Driven(model, comm, grammars=grammars)
    submit_all(driven, prompt)
    driven.run()
    return driven


def with_drafts(
    model: nn.Module,
    comm: Communicator,
    told: Driven,
    *,
    wrong: int = 4,
    count: int = 3,
    **options: object,
) -> Driven:
    """An engine that drafts what another one gave, and errs now and then."""
    foretold = Foretold(told.texts, wrong)
    return Driven(
        model, comm, drafts=foretold, draft_lengths=DraftLengths(count), **options
    )


@pytest.mark.parametrize(("wrong", "count"), [(0, 4), (3, 5), (1, 2)])
def test_what_is_drawn_is_drawn_without_drafts(
    wrong: int,
    count: int,
    plain: Driven,
    model: nn.Module,
    grammars: Grammars,
    prompt: list[int],
    comm: Communicator,
) -> None:
    """By all settings, in a batch: where all drafts are right, some, and none."""
    drafted = with_drafts(
        model, comm, plain, wrong=wrong, count=count, grammars=grammars
    )
    submit_all(drafted, prompt)
    assert drafted.run() == plain.tokens
    assert not drafted.errors
    for one, other in zip(plain.drawn["scores"], drafted.drawn["scores"], strict=True):
        assert one.score is not None and other.score is not None
        assert one.score.logprob == pytest.approx(other.score.logprob, abs=1e-3)
        assert [t for t, _ in one.score.top] == [t for t, _ in other.score.top]
    counts = [x for result in drafted.results for x in result.drafted.values()]
    accepted = sum(accepted for _, accepted in counts)
    assert accepted <= sum(proposed for proposed, _ in counts)
    if wrong == 1:
        assert accepted == 0
    else:
        assert len(drafted.steps) < len(plain.steps)


class Late(Foretold):
    """Drafts that read a prompt for two passes."""

    def propose(self, asked: Any) -> Any:
        """Say first that prompts are read."""
        self.calls = getattr(self, "calls", 0) + 1
        return [None] * len(asked) if self.calls <= 2 else super().propose(asked)


def test_what_reads_a_prompt_does_not_draft_yet(
    plain: Driven, model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """The row goes on without, and its drafts are judged when there are some."""
    told = Late(plain.texts, 0)
    drafted = Driven(model, comm, drafts=told, draft_lengths=DraftLengths(4))
    drafted.submit("greedy", prompt[:40], SETTINGS["greedy"], max_tokens=12)
    assert drafted.run()["greedy"] == plain.tokens["greedy"]
    counts = [x["greedy"] for result in drafted.results if (x := result.drafted)]
    assert counts[0] == (4, 4)
    assert sum(result.drafts_read for result in drafted.results) == 2


def test_drafts_without_a_model(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """Of few words that a text has it soon repeats some; rows come and go meanwhile."""
    few = dict.fromkeys(prompt[:3], 50.0)

    def submit(driven: Driven) -> None:
        for name, length in (("a", 40), ("b", 61), ("c", 10)):
            count = 14 + length // 5
            driven.submit(name, prompt[:length], max_tokens=count, logit_bias=few)
            driven.pass_()

    plain = Driven(model, comm)
    submit(plain)
    drafted = Driven(model, comm, drafts=NgramDrafts(), draft_lengths=DraftLengths(6))
    submit(drafted)
    assert drafted.run() == plain.run()
    assert len(drafted.steps) < len(plain.steps)


@pytest.mark.parametrize("others", [0, 2])
def test_the_prefix_cache_has_what_caches_hold(
    others: int, model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """Also of an answer that ends in the middle of tokens that were accepted."""
    plain = Driven(model, comm)
    plain.submit("a", prompt[:50], max_tokens=30)
    answer = plain.run()["a"]
    drafted = with_drafts(model, comm, plain, wrong=0, count=7)
    for number in range(others):
        drafted.submit(f"other {number}", prompt[3:40], max_tokens=60)
    drafted.submit("a", prompt[:50], max_tokens=30)
    ends_at = 11

    def is_there() -> bool:
        return len(drafted.tokens["a"]) >= ends_at

    while not is_there():
        drafted.pass_()
    drafted.scheduler.end("a")  # as where a stop text is found
    got = list(drafted.tokens["a"])
    assert got == answer[: len(got)]
    drafted.pass_()
    more = [*prompt[:50], *got[:-1], 9, 8, 7]
    plain.submit("again", more, max_tokens=6)
    expected = plain.run()["again"]
    drafted.submit("again", more, max_tokens=6)
    while len(drafted.tokens["again"]) < 6:
        drafted.pass_()
    assert drafted.tokens["again"] == expected
    if comm.rank == 0:
        assert drafted.scheduler.found_tokens == 50 + len(got) - 1


def test_nothing_is_accepted_behind_an_end(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    plain = Driven(model, comm)
    plain.submit("a", prompt[:30], max_tokens=20)
    answer = plain.run()["a"]
    end = answer[5]
    first = answer.index(end) + 1
    for ignores in (False, True):
        drafted = with_drafts(model, comm, plain, wrong=0, count=9, ends=[end])
        drafted.submit("a", prompt[:30], max_tokens=20, ignore_eos=ignores)
        while not drafted.tokens["a"]:
            drafted.pass_()
        assert drafted.tokens["a"] == answer[: 10 if ignores else first]


def test_no_more_than_was_asked_for(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """Nor more than the context has room for: no draft is read for nothing."""
    plain = Driven(model, comm)
    plain.submit("a", prompt[:30], max_tokens=20)
    plain.run()
    drafted = with_drafts(model, comm, plain, wrong=0, count=16)
    drafted.scheduler._context = 45
    drafted.submit("a", prompt[:30], max_tokens=9)
    drafted.submit("b", prompt[:30], max_tokens=None)
    while len(drafted.tokens["b"]) < 15:
        drafted.pass_()
    assert [len(tokens) for tokens in drafted.tokens.values()] == [9, 15]


def test_when_memory_gets_short(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """Drafts take only what is left; the youngest is set back as without them."""
    prompts = {name: prompt[at:][:60] for at, name in enumerate("abc")}
    wide = Driven(model, comm)
    for name, part in prompts.items():
        wide.submit(name, part, max_tokens=40)
    wide.run()
    limit = max(rank.used_bytes([75] * 3, [], 0, 37) for rank in wide.capacity.ranks)
    narrow = with_drafts(model, comm, wide, limit_bytes=limit)
    narrow.run_short(wide, prompts, max_tokens=40)
    assert any(result.width for result in narrow.results)


@pytest.mark.parametrize("passes", [1, 4])
def test_cancelled_beside_others(
    passes: int, model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    plain = Driven(model, comm)
    for name, part in (("stays", prompt[3:50]), ("goes", prompt[:70])):
        plain.submit(name, part, max_tokens=30)
    expected = plain.run()["stays"]
    drafted = with_drafts(model, comm, plain)
    for name, part in (("stays", prompt[3:50]), ("goes", prompt[:70])):
        drafted.submit(name, part, max_tokens=30)
    for _ in range(passes):
        drafted.pass_()
    drafted.scheduler.end("goes")
    drafted.pass_()
    count = len(drafted.tokens["goes"])
    assert drafted.run()["stays"] == expected
    assert len(drafted.tokens["goes"]) == count
    assert not drafted.engine._readers and not drafted.engine._of


def test_interrupted_and_gone_on(
    plain: Driven,
    model: nn.Module,
    grammars: Grammars,
    prompt: list[int],
    comm: Communicator,
) -> None:
    """With its tokens, as after a restart: penalties and grammars follow from them."""
    rest = with_drafts(model, comm, plain, grammars=grammars)
    numbers = {name: number for number, name in enumerate(SETTINGS)}
    for name in ("penalties", "grammar"):
        number = numbers[name]
        part = prompt[number : 40 + 9 * number]
        tokens = (*part, *plain.tokens[name][:5])
        settings = replace(SETTINGS[name], max_tokens=12)
        rest.take(GenerationRequest(name, tokens, len(part), settings))
    for name, tokens in rest.run().items():
        assert tokens == plain.tokens[name][5:]


def test_drafts_are_left_out_and_taken_up_again(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """From one pass to the next, while the token of a pass without is on its way."""

    class EveryThird(DraftLengths):
        calls = 0

        def choose(self, room: Mapping[str, int]) -> dict[str, int]:
            self.calls += 1
            return {} if self.calls % 3 else super().choose(room)

    plain = Driven(model, comm)
    for name, length in (("a", 40), ("b", 61)):
        plain.submit(name, prompt[:length], max_tokens=25)
    expected = dict(plain.run())
    drafted = Driven(
        model, comm, drafts=Foretold(plain.texts), draft_lengths=EveryThird(5)
    )
    for name, length in (("a", 40), ("b", 61)):
        drafted.submit(name, prompt[:length], max_tokens=25)
        drafted.pass_()
    assert drafted.run() == expected
    assert {bool(x.width) for x in drafted.results if x.drawn} == {True, False}

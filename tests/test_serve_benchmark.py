"""What benchmarks/serve.py makes of what it sees, before a front without a model."""

import argparse
import asyncio
import os
import random
from tempfile import TemporaryFile
from types import SimpleNamespace

import pytest
import serve
import soak
from fake_ranks import FakeRanks
from front import serving
from serving import MODEL, Server, load, prompt

pytestmark = pytest.mark.once


def test_clients_at_once_and_gaps() -> None:
    """The speed is that of the script; who is refused has failed."""
    fake = FakeRanks(step_seconds=0.005)
    with serving(fake, model_names=(MODEL,), max_queue=0, max_concurrency=6) as front:
        texts = [prompt(number, 300) for number in range(6)]
        rate, answers, failed = asyncio.run(load(front.url, texts, 20))
        assert failed == 0 and [answer.tokens for answer in answers] == [20] * 6
        assert [len(answer.times) for answer in answers] == [20] * 6
        assert all(
            text.startswith(a.text) for text, a in zip(texts, answers, strict=True)
        )
        assert answers[0].tokens_per_second < min(200, rate)
        _, _, failed = asyncio.run(load(front.url, [*texts, *texts], 20))
        assert failed == 6
        options = argparse.Namespace(others=4, prompt_tokens=300, long_tokens=500)
        ratio, late = asyncio.run(serve.gaps(front.url, options, 100))
        assert ratio > 0.5 and late > 0
    assert len(set(map(tuple, (start.prompt for start in fake.starts[-6:])))) == 6


class Wrong(FakeRanks):
    """After the first requests, one answer in three begins otherwise."""

    def _tell(self, start, **changes):
        number = [other.id for other in self.starts].index(start.id)
        if number >= soak.KINDS and number % 3 == 0:
            for logprob in changes.get("logprobs", []):
                vars(logprob).update(text="?", bytes=[ord("?")])
        super()._tell(start, **changes)


@pytest.mark.parametrize("fake", [FakeRanks, Wrong])
def test_a_short_soak(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that hang up, stall and send rubbish change no other's answer."""
    monkeypatch.setattr(soak, "KINDS", 6)
    here = SimpleNamespace(pid=os.getpid())
    ranks = serving(fake(), model_names=(MODEL,), max_concurrency=64)
    with ranks as front, TemporaryFile() as log:
        seen = soak.soak(Server(here, front.url, log), 16, 1.0, 0)
    assert seen["bad ones among them"] == 2 and seen["tokens"] > 100
    for name in ("answers that part", "of these without a tie", "of these too many"):
        assert (seen[name] > 0) == (fake is Wrong), name


Told = tuple[str, dict[str, float]]


def answer(tokens: list[Told]) -> soak.Answer:
    """Of tokens, each with the likeliest in its place."""
    return soak.Answer([token for token, _ in tokens], [likely for _, likely in tokens])


def told(text: str, read: str = "") -> list[Told]:
    """What is told of a text where what has been read, and no more, says what may come.

    As completions do, it names the token that was drawn beside the two likeliest.
    """
    tokens = []
    for token in text:
        draw = random.Random(read)
        likely = {c: -draw.random() for c in draw.sample("abcdefgh", 2)}
        tokens.append((token, {token: -2.5} | likely))
        read += token
    return tokens


def test_what_parts_two_answers() -> None:
    likeliest = [{"a": -1.0, "c": -1.5}, {"b": -1.0, "d": -1.0004}]
    alone = soak.Answer(["a", "b"], likeliest)
    greedy = {"temperature": 0}

    def parted(*tokens: str):
        return soak.parting(greedy, alone, soak.Answer(list(tokens), likeliest))

    assert parted("a", "b") is None
    assert parted("a", "d")[1] == soak.TIED
    for tokens in (("c", "b"), ("a", "x"), ("a",)):
        assert parted(*tokens)[1] == soak.NOT_TIED


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_seed_explains_no_wrong_answer(temperature: float) -> None:
    """A token doubled, missing, or another that the ranks have read."""
    body = {"temperature": temperature, "seed": 5}
    right = told("pqrst")
    wrong = [
        [*right[:2], *right[1:]],
        [*right[:2], *right[3:]],
        right[:-1],
        [*right, *told("u", "pqrst")],
        told("pqXYZ", "other"),
        # The ranks have read it so: the tokens that they give are told rightly.
        [*right[:2], *told("xyz", "pqq")],
        [*right[:2], *told("xyz", "p")],
    ]
    for one in wrong:
        _, why = soak.parting(body, answer(right), answer(one))
        assert why == soak.NOT_TIED, one


def test_a_seed_explains_a_few_partings() -> None:
    """Where all is equally likely; one that is lost would part more answers."""
    body = {"temperature": 1, "seed": 5}
    right = told("pqrst")
    other = [*right[:2], *told("x", "pq"), *told("y", "pqx")]
    parted = soak.parting(body, answer(right), answer(other))
    assert parted is not None and parted[1] == soak.SEED
    for number, count, too_many in (
        (0, 0, 0),
        (1, 10, 0),
        (2, 10, 1),
        (3, 30_000, 0),
        (5, 30_000, 2),
    ):
        seen = soak.counts(number * [parted], count)
        assert seen["of these with a seed"] == seen["answers that part"] == number
        assert seen["of these without a tie"] == 0
        assert seen["of these too many"] == too_many

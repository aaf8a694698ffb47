"""What benchmarks/serve.py makes of what it sees, before a front without a model."""

import argparse
import asyncio
import os
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
    assert (seen["answers that part"] > 0) == (fake is Wrong)
    assert seen["of these without a tie"] <= seen["answers that part"]


def test_what_parts_two_answers() -> None:
    alone = soak.Answer(["a", "b"], [{"a": -1.0, "c": -1.5}, {"b": -1.0, "d": -1.0004}])
    greedy = {"temperature": 0}

    def parted(*tokens: str):
        return soak.parting(greedy, alone, soak.Answer(list(tokens), []))

    assert parted("a", "b") is None
    assert parted("a", "d")[1] == soak.TIED
    for tokens in (("c", "b"), ("a", "x"), ("a",)):
        assert parted(*tokens)[1] == soak.NOT_TIED
    drawn = {"temperature": 1, "seed": 5}
    assert soak.parting(drawn, alone, soak.Answer(["x"], []))[1] == soak.SEED

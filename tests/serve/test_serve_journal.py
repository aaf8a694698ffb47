"""A front dies, and a client that asks again gets the answer that was begun."""

import asyncio
import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fake_ranks
import httpx2
import pytest
from server import Server, running
from serving import in_float32

from mlxtp.generation.settings import Settings
from mlxtp.serve.front import journal
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.journal import Asked, Journal
from mlxtp.serve.front.ranks import Ranks
from mlxtp.serve.messages import Event, Start, TokenLogprob

pytestmark = pytest.mark.once


def starts(text: str = "abc", count: int = 2, **settings: object) -> list[Start]:
    """Requests as `admit` gives them, each time with new ids and seeds."""
    now = time.monotonic_ns()
    return [
        Start(f"{now} {n}", list(text.encode()), Settings(9, seed=now + n, **settings))
        for n in range(count)
    ]


def asked(key: str, body: str = "abc") -> Asked:
    found = Asked.of(key, b"/v1/completions", b"", body.encode())
    assert found is not None
    return found


def refused(journal: Journal, key: str, body: str = "abc") -> int:
    with pytest.raises(Refusal) as error:
        journal.begin(asked(key, body), starts())
    return error.value.status


def test_what_is_written_and_found(tmp_path: Path) -> None:
    async def life() -> None:
        ranks = Ranks()
        ranks.ready = fake_ranks.READY
        journal = Journal(tmp_path / "journal", ranks)
        first = journal.begin(asked("key"), starts())
        [file] = (tmp_path / "journal").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        assert "abc" not in file.read_text()
        one, two = (ranks.start(start) for start in first)
        ranks._take(Event(one.start.id, tokens=[5, 6]))
        ranks._take(Event(two.start.id, tokens=[7]))
        ranks._take(Event(one.start.id, tokens=[8]))
        assert refused(journal, "key") == 409
        assert refused(journal, "k" * 300) == 400

        # The front dies while it writes; the next one finds what was there.
        with file.open("a") as writing:
            writing.write("[0, 9")
        after = Ranks()
        after.ready = fake_ranks.READY
        journal = Journal(tmp_path / "journal", after)
        assert refused(journal, "key", "other") == 422
        Journal(tmp_path / "journal", after, "another model").begin(asked("key"), [])
        again = journal.begin(asked("key"), starts())
        assert [start.generated for start in again] == [[5, 6, 8], [7]]
        assert [s.settings.seed for s in again] == [s.settings.seed for s in first]
        assert all(start.tells_generated for start in again)
        one, two = (after.start(start) for start in again)
        told = Event(one.start.id, tokens=[5, 6, 8], is_told_again=True)
        after._take(told)
        after._take(Event(one.start.id, tokens=[9], finish="length"))
        assert file.exists()
        # Whose client hangs up can be asked for again.
        two.cancel()
        again = journal.begin(asked("key"), starts())
        assert [start.generated for start in again] == [[5, 6, 8, 9], [7]]
        assert [start.finished for start in again] == ["length", None]
        for start in again:
            after.start(start)
        told = Event(again[0].id, tokens=[5, 6, 8, 9], finish="length")
        after._take(replace(told, is_told_again=True))
        after._take(Event(again[1].id, finish="stop"))
        assert not file.exists()
        await ranks.close()
        await after.close()

    asyncio.run(life())


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """Let no file grow above so many bytes in this block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room_bytes", [0, 3, 8])
def test_nothing_is_kept_behind_a_hole(
    room_bytes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk is full for a moment: the tokens before it are what the next front has."""

    async def life() -> None:
        ranks = Ranks()
        ranks.ready = fake_ranks.READY
        journal = Journal(tmp_path, ranks)
        one, two = map(ranks.start, journal.begin(asked("key"), starts()))
        ranks._take(Event(one.start.id, tokens=[5, 6]))
        [file] = tmp_path.iterdir()
        with full_disk(file.stat().st_size + room_bytes):
            ranks._take(Event(one.start.id, tokens=[71, 72]))
            ranks._take(Event(two.start.id, tokens=[81]))
        ranks._take(Event(one.start.id, tokens=[73], finish="stop"))
        ranks._take(Event(two.start.id, tokens=[82]))
        assert refused(journal, "key") == 409
        # The front dies.
        again = Journal(tmp_path, Ranks()).begin(asked("key"), starts())
        assert [start.generated for start in again] == [[5, 6], []]
        assert [start.finished for start in again] == [None, None]
        # It does not die: a whole answer is forgotten.
        ranks._take(Event(two.start.id, finish="stop"))
        assert not list(tmp_path.iterdir())

    asyncio.run(life())
    assert caplog.text.count("keeps a request no further") == 1


def test_a_request_that_could_not_be_noted(tmp_path: Path) -> None:
    """It is under way as others are, and what was known of it is forgotten with it."""

    async def life() -> None:
        ranks = Ranks()
        ranks.ready = fake_ranks.READY
        journal = Journal(tmp_path, ranks)
        [start] = journal.begin(asked("key"), starts(count=1))
        generation = ranks.start(start)
        ranks._take(Event(start.id, tokens=[5, 6]))
        generation.cancel()
        with full_disk(10):
            [start] = journal.begin(asked("key"), starts(count=1))
        assert start.generated == [5, 6]
        assert refused(journal, "key") == 409
        ranks.start(start)
        ranks._take(Event(start.id, tokens=[7], finish="stop"))
        assert not list(tmp_path.glob("*.jsonl"))

    asyncio.run(life())


def test_with_log_probabilities_it_begins_anew(tmp_path: Path) -> None:
    async def life() -> None:
        ranks = Ranks()
        ranks.ready = fake_ranks.READY
        journal = Journal(tmp_path, ranks)
        [start] = journal.begin(asked("key"), starts(count=1, logprobs=1))
        generation = ranks.start(start)
        score = TokenLogprob(5, "a", [97], -1.0)
        ranks._take(Event(start.id, tokens=[5], logprobs=[score]))
        generation.cancel()
        [again] = journal.begin(asked("key"), starts(count=1, logprobs=1))
        assert again.generated == [] and not again.tells_generated
        assert again.settings.seed == start.settings.seed
        await ranks.close()

    asyncio.run(life())


@pytest.mark.slow
def test_the_front_dies_and_another_goes_on(tmp_path: Path) -> None:
    """With a true model: the answer is the one that nobody disturbed."""
    body = {"prompt": "Once upon a time", "max_tokens": 200, "stream": True}
    body |= {"model": "stories", "temperature": 1, "seed": 5}
    headers = {"Idempotency-Key": "a key"}
    begun = ""

    def told(server: Server, headers: dict[str, str], most: int | None = None) -> str:
        nonlocal begun
        text, url = "", f"{server.url}/v1/completions"
        with httpx2.stream("POST", url, json=body, headers=headers) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    text += choices[0]["text"] if choices else ""
                    begun = text if most is not None else begun
                if most is not None and len(text) > most:
                    os.kill(server.process.pid, signal.SIGKILL)
                    most = None
        return text

    # In float32: a prompt is added up in another order than one token after another.
    options = ("--model", in_float32(tmp_path / "model"))
    options += ("--journal-dir", tmp_path / "journal", "--served-model-name", "stories")
    with pytest.raises((httpx2.HTTPError, AssertionError)), running(*options) as server:
        undisturbed = told(server, {})
        told(server, headers, 100)
    [file] = (tmp_path / "journal").iterdir()
    known = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert sum(len(line) - 1 for line in known) > 20
    with running(*options) as server:
        assert told(server, headers) == undisturbed
        metrics = httpx2.get(f"{server.url}/metrics").text
    assert undisturbed.startswith(begun) and len(undisturbed) > len(begun) > 100
    assert not list((tmp_path / "journal").iterdir())
    generated = re.search(r"mlxtp:generation_tokens_total\S* (\d+)", metrics)
    assert generated is not None and int(generated[1]) <= 180  # of 200


def test_old_requests_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are too many, but none that is under way; not at each request."""

    def write(**ages: float) -> None:
        for name, age in ages.items():
            file = tmp_path / f"{name}.jsonl"
            file.write_text("{}")
            os.utime(file, (time.time() - age, time.time() - age))

    def names() -> list[str]:
        return sorted(file.stem for file in tmp_path.iterdir() if len(file.stem) < 9)

    write(old=90_000, new=60)
    log = Journal(tmp_path, Ranks())
    assert names() == ["new"]
    log.begin(asked("a"), starts())
    monkeypatch.setattr(journal, "MOST_KEPT", 2)
    write(older=500, newer=50)
    log.begin(asked("b"), starts())
    assert len(names()) == 3
    monkeypatch.setattr(journal, "LOOK_SECONDS", 0.0)
    log.begin(asked("c"), starts())
    assert names() == ["new", "newer"] and len([*tmp_path.iterdir()]) == 5

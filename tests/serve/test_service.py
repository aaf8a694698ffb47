"""What rank 0 decides, and what it tells the front of a pass."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from toy_tokenizers import byte_level

from mlxtp import Communicator
from mlxtp.fetch.spare import Spare
from mlxtp.generation.drawing import Score
from mlxtp.generation.engine import Drawn, Result
from mlxtp.generation.settings import Settings
from mlxtp.generation.step import Admission, GenerationRequest, Step
from mlxtp.serve import messages
from mlxtp.serve.messages import Event, Events, Start
from mlxtp.serve.ranks.answer import AnswerText, Piece
from mlxtp.serve.ranks.service import BROKEN, LOGPROBS_TOLD, Service
from mlxtp.serve.ranks.text import Text

pytestmark = pytest.mark.once


def service_of(tokenizer: Any, link: Any, scheduler: Any, *, context: int) -> Service:
    """A service without a prefix cache and spare slices, and whose text has no end."""
    nothing: Any = None
    return Service(
        *(link, Text(tokenizer, len(tokenizer)), scheduler, nothing, nothing),
        Spare(nothing, None),
        context=context,
        ends=(),
        rows=len(tokenizer),
    )


def test_prompt_logprobs_come_in_parts_and_once() -> None:
    """In lines that the front can read; not again for a request that was set back."""
    tokenizer = byte_level()
    prompt = [3] * (2 * LOGPROBS_TOLD + 100)
    settings = Settings(max_tokens=4, seed=0, prompt_logprobs=1)
    sent: list[Events] = []
    link: Any = SimpleNamespace(send=sent.append)
    scheduler: Any = SimpleNamespace(
        submit=lambda request: None, passed=lambda *_: None
    )
    nothing: Any = None
    service = Service(
        link,
        Text(tokenizer, len(tokenizer)),
        scheduler,
        nothing,
        nothing,
        Spare(nothing, None),
        context=10_000,
        ends=(),
        rows=len(tokenizer),
    )
    service._take(Start("a", prompt, settings))
    scores = [Score(-0.5, [(4, -0.25)])] * (len(prompt) - 1)
    for _ in range(2):
        service.report(Result(read={"a": scores}))
    events = [event for line in sent for event in line.events]
    told = [one for event in events for one in event.prompt_logprobs or ()]
    assert told[0] is None and len(told) == len(prompt)
    assert told[-1] is not None and told[-1].top[0].logprob == -0.25
    lengths = [sum(len(e.prompt_logprobs or ()) for e in line.events) for line in sent]
    assert max(lengths) <= LOGPROBS_TOLD
    assert [event for event in events if event.read] == [Event("a", read=len(prompt))]


def test_spare_slices_come_while_there_is_nothing_to_do(comm: Communicator) -> None:
    """From the start on, a step at a time; requests come between two steps."""
    tokenizer = byte_level()

    def take(*, wait: bool) -> list[Any]:
        return [messages.End()] if wait else []

    link: Any = SimpleNamespace(take=take)
    of_request = Step(drop=("a",))
    scheduler: Any = SimpleNamespace(is_idle=True, decide=lambda: of_request)
    nothing: Any = None
    store: Any = SimpleNamespace(has_unwritten=False)
    spare = Spare(comm, iter([None] * 2))
    service = Service(
        *(link, Text(tokenizer, len(tokenizer)), scheduler, nothing, store, spare),
        context=10_000,
        ends=(),
        rows=len(tokenizer),
    )
    service._last_counts = time.monotonic()
    assert service.decide().spares
    spare.step()
    scheduler.is_idle = False
    assert service.decide() == of_request
    scheduler.is_idle = True
    for _ in range(2):
        assert service.decide().spares
        spare.step()
    assert service.decide().is_idle
    assert service.decide().is_end


def test_a_text_that_fails_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever raises: at its start, at a token, or for its log-probabilities."""
    tokenizer = byte_level()
    a, b = tokenizer.encode("ab")
    sent: list[Events] = []
    ended: list[str] = []
    link: Any = SimpleNamespace(send=sent.append)
    scheduler: Any = SimpleNamespace(
        submit=lambda request: None,
        passed=lambda *_: None,
        add=lambda *pair: None,
        end=ended.append,
    )
    nothing: Any = None
    text = Text(tokenizer, len(tokenizer))
    service = Service(
        *(link, text, scheduler, nothing, nothing, Spare(nothing, None)),
        context=100,
        ends=(),
        rows=len(tokenizer),
    )
    push = AnswerText.push

    def fails_at_b(answer: AnswerText, token: int) -> list[Piece]:
        if token == b:
            raise KeyError("name")
        return push(answer, token)

    monkeypatch.setattr(AnswerText, "push", fails_at_b)
    settings = Settings(max_tokens=9, seed=0)
    scored = Settings(max_tokens=9, seed=0, prompt_logprobs=1)
    service._take(Start("again", [a], settings, generated=[b]))
    service._take(Start("bad", [a], settings))
    service._take(Start("good", [a], settings))
    service._take(Start("scored", [a, a], scored))
    text.__dict__["bytes_of"] = []
    service.report(Result(read={"scored": [Score(-0.5, [])]}))
    drawn = {"bad": [Drawn(b), Drawn(a)], "good": [Drawn(a)], "scored": [Drawn(a)]}
    service.report(Result(drawn=drawn))
    told = [event for line in sent for event in line.events]
    assert {event.id for event in told if event.error == BROKEN} == {*ended}
    assert [*ended] == ["again", "scored", "bad"]
    assert told[-1].id == "good" and told[-1].pieces and not told[-1].is_mistake
    assert caplog.text.count("Traceback") == 3


def test_tokens_that_come_together_are_told_one_by_one() -> None:
    """An answer ends where it would have; caches hold what came behind it."""
    tokenizer = byte_level()
    a, b, c = tokenizer.encode("abc")
    sent: list[Events] = []
    added: list[tuple[str, int]] = []
    ended: list[str] = []
    link: Any = SimpleNamespace(send=sent.append)
    scheduler: Any = SimpleNamespace(
        submit=lambda request: None,
        passed=lambda *_: None,
        add=lambda *pair: added.append(pair),
        end=ended.append,
    )
    service = service_of(tokenizer, link, scheduler, context=100)
    settings = Settings(max_tokens=3, seed=0)
    service._take(Start("short", [a], settings))
    service._take(Start("stopped", [a], Settings(max_tokens=9, seed=0), stop=["b"]))
    drawn = [Drawn(token) for token in (a, b, c, a)]
    service.report(Result(drawn={"short": drawn, "stopped": drawn}, width=4))
    (events,) = [line.events for line in sent]
    told = [(e.id, e.tokens, e.finish, e.stop) for e in events]
    assert told == [
        ("short", [a], None, None),
        ("short", [b], None, None),
        ("short", [c], "length", None),
        ("stopped", [a], None, None),
        ("stopped", [b], "stop", "b"),
    ]
    assert added == [(name, x.token) for name in ("short", "stopped") for x in drawn]
    assert ended == ["short", "stopped"]


def test_who_is_admitted_is_told_before_the_pass() -> None:
    """It may end the ranks."""
    tokenizer = byte_level()
    sent: list[Events] = []
    start = Start("a", [3], Settings(max_tokens=3, seed=0))
    given: list[Any] = [start]
    link: Any = SimpleNamespace(
        send=sent.append, take=lambda wait: [given.pop()] if given else []
    )
    request = GenerationRequest("a", (3,), 1, start.settings)
    step = Step(admit=(Admission(request, cached=0),))
    scheduler: Any = SimpleNamespace(
        submit=lambda request: None, is_idle=False, decide=lambda: step
    )
    service = service_of(tokenizer, link, scheduler, context=100)
    service._last_counts = time.monotonic()
    assert service.decide() == step
    assert [line.events for line in sent] == [[Event("a", admitted=True)]]


@pytest.mark.parametrize("tells", [True, False])
def test_an_answer_for_which_no_room_is_left(tells: bool) -> None:
    """As at the end of the context: with what was held back, and no mistake."""
    tokenizer = byte_level(special=["<tool_call>", "</tool_call>"])
    sent: list[Events] = []
    link: Any = SimpleNamespace(send=sent.append)
    service = service_of(tokenizer, link, None, context=9)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    generated = tokenizer.encode('Hi <tool_call>{"name"')
    settings = Settings(max_tokens=99, seed=0)
    start = Start("a", [3, 3], settings, generated, tools=[tool], is_chat=True)
    service._take(replace(start, tells_generated=tells))
    ((event,),) = [line.events for line in sent]
    held = '<tool_call>{"name"'
    assert "".join(text for _, text in event.pieces) == ("Hi " if tells else "") + held
    assert event.tokens == (generated if tells else [])
    assert event.finish == "length" and not event.is_mistake
    finished = replace(start, tells_generated=True, finished="stop")
    service._take(finished)
    assert sent[-1].events[0].finish == "stop"

"""The socket between front and rank 0, with both of its ends."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import Mock

import fake_ranks
import pytest

from mlxtp.generation.settings import Settings
from mlxtp.serve import messages
from mlxtp.serve.front import ranks as front_ranks
from mlxtp.serve.front.answers import merged
from mlxtp.serve.front.ranks import CALLS_AT_ONCE, Mistake, Ranks, Unavailable
from mlxtp.serve.ranks import __main__ as program
from mlxtp.serve.ranks import link as link_module
from mlxtp.serve.ranks.link import Link

pytestmark = pytest.mark.once


class Callee:
    """What rank 0 calls for the front; `heard` are the texts, in order."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.may_go_on = threading.Event()

    def echo(self, text: str) -> dict[str, Any]:
        """Give it back."""
        return {"text": text}

    def wait(self, text: str) -> dict[str, Any]:
        """Give it back when `may_go_on`."""
        self.heard.append(text)
        self.may_go_on.wait(30)
        raise ValueError(text)


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Ranks, Link, Callee]]:
    """A front and the rank 0 that has come to it, which is ready."""
    async with Ranks() as ranks:
        link = await asyncio.to_thread(Link, await ranks.listen())
        link.callee = callee = Callee()
        link.send(fake_ranks.READY)
        await ranks.is_ready.wait()
        yield ranks, link, callee


def test_a_result_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a mistake of the request, and no end of the connection."""
    monkeypatch.setattr(messages, "LONGEST_ANSWER", 1000)

    async def life() -> None:
        async with linked() as (ranks, link, _):
            with pytest.raises(Mistake, match="at most"):
                await ranks.call("echo", text="a" * 1000)
            assert await ranks.call("echo", text="a") == {"text": "a"}
        assert await asyncio.to_thread(link.take, wait=True) == [messages.End()]

    asyncio.run(life())


def test_calls_of_clients_that_have_gone(caplog: pytest.LogCaptureFixture) -> None:
    """Never reach rank 0, but for the few that it had; the next one is answered."""

    async def life() -> None:
        async with linked() as (ranks, _, callee):
            many = [
                asyncio.create_task(ranks.call("wait", text=str(number)))
                for number in range(9)
            ]
            while not callee.heard:
                await asyncio.sleep(0.001)
            for task in many[:CALLS_AT_ONCE]:
                task.cancel()
            await asyncio.sleep(0.01)  # others would take their room
            for task in many[CALLS_AT_ONCE:8]:
                task.cancel()
            last = asyncio.create_task(ranks.call("echo", text="a"))
            await asyncio.sleep(0)
            callee.may_go_on.set()
            with pytest.raises(Mistake, match="8"):
                await many[8]
            assert await last == {"text": "a"}
            sent = [*map(str, range(CALLS_AT_ONCE)), "8"]
            assert callee.heard == sent
            # Those that wait hear that no rank 0 is to come.
            callee.may_go_on.clear()
            many = [
                asyncio.create_task(ranks.call("wait", text="b"))
                for _ in range(CALLS_AT_ONCE + 1)
            ]
            await asyncio.sleep(0.001)
            ranks.lost("all is lost")
            told = await asyncio.gather(*many, return_exceptions=True)
            assert [type(error) for error in told] == [Unavailable] * len(many)
            callee.may_go_on.set()

    asyncio.run(life())
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("count", [1, 2])
def test_events_that_nobody_reads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are no more than so many: then the request ends, for its client and rank 0."""
    monkeypatch.setattr(front_ranks, "MOST_UNREAD", 10)

    async def life() -> None:
        async with linked() as (ranks, link, _):
            settings = Settings(max_tokens=None, seed=0)
            names = [str(number) for number in range(count)]
            starts = [messages.Start(name, [1], settings) for name in names]
            events = merged([ranks.start(start) for start in starts])
            assert await asyncio.to_thread(link.take, wait=True)
            told = [messages.Event(name, tokens=[1]) for name in names]
            link.send(messages.Events(told))
            await anext(events)  # a client that reads no more
            for _ in range(30):
                link.send(messages.Events(told))
                await asyncio.sleep(0.001)  # what reads has time to
            async with asyncio.timeout(20):
                while ranks.generations:
                    await asyncio.sleep(0.001)
            read = 0
            with suppress(Unavailable):
                async for _ in events:
                    read += 1
            assert read <= count * 12
            cancelled: list[str] = []
            while len(cancelled) < count:
                for message in await asyncio.to_thread(link.take, wait=True):
                    if isinstance(message, messages.Cancel):
                        cancelled.append(message.id)
            assert cancelled == names

    asyncio.run(life())


def test_ranks_that_have_gone_are_not_ready() -> None:
    """From the moment on, before it is known why: /health says so."""

    async def life() -> None:
        async with linked() as (ranks, link, _):
            assert ranks.state == "ready"
            link._socket.shutdown(socket.SHUT_RDWR)
            await ranks.is_gone.wait()
            assert ranks.state == "recovering"

    asyncio.run(life())


@pytest.mark.parametrize("loads", [True, False])
def test_ranks_that_load_end_with_their_front(
    loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that serve end in order; a front that only lost the connection is there."""
    leave = Mock()
    monkeypatch.setattr(link_module.os, "_exit", leave)

    async def life() -> None:
        for is_killed in (False, True):
            ranks = Ranks()
            link = await asyncio.to_thread(Link, await ranks.listen())
            link.callee = None if loads else Callee()
            await ranks.has_come.wait()
            if is_killed:
                ranks._server.close()
            ranks.recover("lost")
            assert await asyncio.to_thread(link.take, wait=True) == [messages.End()]
            assert leave.called == (is_killed and loads)
            await ranks.close()

    asyncio.run(life())


def test_rank_0_meets_the_front_before_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one of these is lost rank 0 ends, and so the front hears of it."""
    meet = Mock()
    monkeypatch.setattr(Link, "of_environment", meet)
    monkeypatch.setattr(program, "connect", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        program.main()
    meet.assert_called_once()


def test_long_parts_lengthen_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host lost before MPI has started costs --timeout, not eight times it."""
    world = Mock()
    monkeypatch.setattr(program.Communicator, "world", world)
    monkeypatch.setattr(program, "check_same_start", Mock())
    program.connect(["--prefill-step-size", "4096", "--timeout", "30"])
    how = world.call_args.kwargs
    assert (how["start_seconds"], how["timeout_seconds"]) == (30, 240)

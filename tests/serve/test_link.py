"""The socket between front and rank 0, with both of its ends."""

import asyncio
import socket
from typing import Any
from unittest.mock import Mock

import fake_ranks
import pytest

from mlxtp.serve import messages
from mlxtp.serve.front.ranks import Mistake, Ranks
from mlxtp.serve.ranks import __main__ as program
from mlxtp.serve.ranks import link as link_module
from mlxtp.serve.ranks.link import Link

pytestmark = pytest.mark.once


class Callee:
    """What rank 0 calls for the front."""

    def echo(self, text: str) -> dict[str, Any]:
        """Give it back."""
        return {"text": text}


def test_a_result_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a mistake of the request, and no end of the connection."""
    monkeypatch.setattr(messages, "LONGEST_ANSWER", 1000)

    async def life() -> None:
        ranks = Ranks()
        await ranks.listen()
        link = await asyncio.to_thread(Link, ranks.folder)
        link.callee = Callee()
        link.send(fake_ranks.READY)
        await ranks.is_ready.wait()
        with pytest.raises(Mistake, match="at most"):
            await ranks.call("echo", text="a" * 1000)
        assert await ranks.call("echo", text="a") == {"text": "a"}
        await ranks.close()
        assert await asyncio.to_thread(link.take, wait=True) == [messages.End()]

    asyncio.run(life())


def test_ranks_that_have_gone_are_not_ready() -> None:
    """From the moment on, before it is known why: /health says so."""

    async def life() -> None:
        ranks = Ranks()
        await ranks.listen()
        link = await asyncio.to_thread(Link, ranks.folder)
        link.send(fake_ranks.READY)
        await ranks.is_ready.wait()
        assert ranks.state == "ready"
        link._socket.shutdown(socket.SHUT_RDWR)
        await ranks.is_gone.wait()
        assert ranks.state == "recovering"
        await ranks.close()

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
            await ranks.listen()
            link = await asyncio.to_thread(Link, ranks.folder)
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

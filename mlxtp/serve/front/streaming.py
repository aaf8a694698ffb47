"""Answers that are sent while they are made: server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mlxtp.serve.front import errors
from mlxtp.serve.front.ranks import Generation

KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE = ": keep-alive\n\n"
MOST_UNSENT = 64  # events that are kept for a client that reads slowly


def server_sent(data: Any, event: str | None = None) -> str:
    """Write JSON, or a word such as [DONE], as one event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"


def openai_error(error: errors.Refusal) -> str:
    """Write an error that comes in the middle of an answer, as OpenAI does."""
    return server_sent(errors.body(error)) + server_sent("[DONE]")


class EventStream(StreamingResponse):
    """A stream of events that ends what makes them when it ends, however it does."""

    def __init__(
        self,
        content: AsyncIterator[str],
        making: "asyncio.Task[None]",
        generations: Sequence[Generation],
    ) -> None:
        super().__init__(
            content,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._making, self._generations = making, generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, as ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._making.cancel()
            cancel_all(self._generations)


def cancel_all(generations: Sequence[Generation]) -> None:
    """Cancel those that are not over."""
    for generation in generations:
        generation.cancel()


# Texts as they are made; then None, or what went wrong.
_Made = asyncio.Queue[str | Exception | None]


async def stream(
    events: AsyncGenerator[str],
    generations: Sequence[Generation],
    *,
    error_event: Callable[[errors.Refusal], str] = openai_error,
    keep_alive: str = KEEP_ALIVE,
) -> EventStream:
    """Send events, `keep_alive` whenever none has come for ten seconds, and errors.

    What is wrong before the first event has a status of its own: it is awaited here,
    unless it takes too long.

    Raises: what `events` raises before its first one.
    """
    made: _Made = asyncio.Queue(MOST_UNSENT)
    making = asyncio.create_task(_make(events, made))
    try:
        first = await _next(made, keep_alive)
        if isinstance(first, Exception):
            raise first
    except BaseException:
        making.cancel()
        cancel_all(generations)
        raise
    content = _sent(first, made, error_event, keep_alive)
    return EventStream(content, making, generations)


async def _make(events: AsyncGenerator[str], made: _Made) -> None:
    """Hand on what is made, as far as what was made before has been sent."""
    try:
        async with aclosing(events):  # it may have tasks of its own
            async for event in events:
                await made.put(event)
    except Exception as error:
        await made.put(error)
    else:
        await made.put(None)


async def _next(made: _Made, keep_alive: str) -> str | Exception | None:
    try:
        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
            return await made.get()
    except TimeoutError:
        return keep_alive


async def _sent(
    upcoming: str | Exception | None,
    made: _Made,
    error_event: Callable[[errors.Refusal], str],
    keep_alive: str,
) -> AsyncIterator[str]:
    """Yield events from the upcoming one on; those that have gathered together."""
    while upcoming is not None:
        text = ""
        while isinstance(upcoming, str):
            text += upcoming
            if made.empty():
                break
            upcoming = made.get_nowait()
        if isinstance(upcoming, Exception):
            yield text + error_event(errors.refusal(upcoming))
            return
        yield text
        if upcoming is not None:
            upcoming = await _next(made, keep_alive)

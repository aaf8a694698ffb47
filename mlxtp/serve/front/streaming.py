"""Answers that are sent while they are made: server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mlxtp.serve.front import errors
from mlxtp.serve.front.ranks import Generation

KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE = ": keep-alive\n\n"


def server_sent(data: Any, event: str | None = None) -> str:
    """Write JSON, or a word such as [DONE], as one event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"


def openai_error(error: errors.Refusal) -> str:
    """Write an error that comes in the middle of an answer, as OpenAI does."""
    return server_sent(errors.body(error)) + server_sent("[DONE]")


class EventStream(StreamingResponse):
    """A stream of events that cancels its generations when it ends, however it does."""

    def __init__(
        self, content: AsyncIterator[str], generations: Sequence[Generation]
    ) -> None:
        super().__init__(
            content,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, as ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel_all(self._generations)


def cancel_all(generations: Sequence[Generation]) -> None:
    """Cancel those that are not over."""
    for generation in generations:
        generation.cancel()


async def stream(
    events: AsyncIterator[str],
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
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=KEEP_ALIVE_SECONDS)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        cancel_all(generations)
        raise
    content = _sent(first, events, error_event, keep_alive)
    return EventStream(content, generations)


async def _sent(
    upcoming: "asyncio.Future[str]",
    events: AsyncIterator[str],
    error_event: Callable[[errors.Refusal], str],
    keep_alive: str,
) -> AsyncIterator[str]:
    """Yield events as they come, from the upcoming one on."""
    try:
        with suppress(StopAsyncIteration):
            while True:
                if not upcoming.done():
                    await asyncio.wait({upcoming}, timeout=KEEP_ALIVE_SECONDS)
                if not upcoming.done():
                    yield keep_alive
                    continue
                yield upcoming.result()
                upcoming = asyncio.ensure_future(anext(events))
    except Exception as error:
        yield error_event(errors.refusal(error))
    finally:
        upcoming.cancel()

"""Connections of clients: how many there are, and how long one may say nothing.

What one sends is uvicorn's to read; these are the limits that it has not.
"""

import asyncio
import resource
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# How long the head of a request may take, from the connection or the answer before it.
HEAD_SECONDS = 30.0
# The longest head of a request that is read, and refused in words if it is longer than
# `security.MAX_HEADER_BYTES`. A client may send one while it is answered.
MOST_HEAD_BYTES = 64 << 10
# Files that are open besides connections: sockets, pipes, logs, the journal.
SPARE_FILES = 64
# As many as macOS lets a process have, OPEN_MAX. With launchd it begins with 256.
MOST_FILES = 10_240


def raise_open_files() -> None:
    """Let this process open as many files as it may, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        # macOS may have been told to allow fewer (kern.maxfilesperproc).
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """Return how many there may be: a few files less than may be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(soft - SPARE_FILES, 1)


class Connection(H11Protocol):
    """A connection of uvicorn's.

    One too many is closed at once, and so is one whose request has no whole head in
    time. What comes behind a request that is being answered waits here: uvicorn would
    stop reading, and not notice that the client hangs up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # h11 would read 16 KiB of a head that comes in parts.
        self.conn = type(self.conn)(self.conn.our_role, MOST_HEAD_BYTES)
        self._head: asyncio.TimerHandle | None = None
        self._unsent = 0  # bytes of answers, when the head's time began
        self._early = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._is_answering and not self.cycle.more_body:
            self._early += data
            if len(self._early) > MOST_HEAD_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Go on with what has come meanwhile."""
        super().on_response_complete()
        self._watch_head()
        early, self._early = self._early, b""
        if early and not self.transport.is_closing():
            self.data_received(early)

    @property
    def _is_answering(self) -> bool:
        """A request is there, at least its head, and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_head(self) -> None:
        """Limit the time of a head that is still to come; not the time of an answer."""
        if self._is_answering:
            if self._head is not None:
                self._head.cancel()
            self._head = None
        elif self._head is None:
            self._unsent = self.transport.get_write_buffer_size()
            self._head = self.loop.call_later(HEAD_SECONDS, self._end_head)

    def _end_head(self) -> None:
        """Close, but for a client that still reads the answer before."""
        self._head = None
        if 0 < self.transport.get_write_buffer_size() < self._unsent:
            self._watch_head()
        else:
            self.transport.abort()

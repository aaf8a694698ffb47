"""The job of the ranks, as the front sees it, and the requests that it works on.

The front owns the requests: prompt, settings and all tokens so far. So it can outlive
the ranks, and hand a request to the next job where the last one left it.
"""

import asyncio
import hmac
import itertools
import os
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from mlxtp.serve import messages
from mlxtp.serve.messages import Event, Ready, Start, Stats

State = Literal[
    "starting", "loading", "ready", "recovering", "waiting", "draining", "ended"
]


# A request may be what ends the ranks: others are not to suffer from it for ever.
MOST_FRUITLESS = 3
# A call that so many jobs were lost with gets an error: others do not wait for it.
MOST_FRUITLESS_CALLS = 2

# Calls that rank 0 has at once: one that it answers, and one to go on with.
CALLS_AT_ONCE = 2

# Events of a request that wait for its client: one reads slowly, or not at all.
MOST_UNREAD = 4096


class Mistake(ValueError):
    """What a client asked for cannot be done; the message says what was wanted."""


class Unavailable(RuntimeError):
    """The ranks cannot take a request now; the message says why."""


class Generation:
    """A request that was started: iterate over it for its events.

    `start` is what was asked for, `tokens` are those generated so far, of which
    `reasoning_tokens` are reasoning, `cached` those of the prompt that were not read.
    Times are seconds of the monotonic clock, None before.
    """

    def __init__(self, start: Start, ranks: "Ranks") -> None:
        self.start = start
        self.told_logprobs = 0  # of the prompt's tokens
        self._heard_logprobs = 0  # of them, from the job that works on it now
        self.fruitless = 0  # jobs that were lost while they worked on it, in turn
        self.tokens: list[int] = [] if start.tells_generated else [*start.generated]
        self._had = len(self.tokens)  # when this job began
        self._is_at_work = False
        self.reasoning_tokens = 0
        self.cached = 0
        self.begun = time.monotonic()
        self.admitted: float | None = None
        self.is_over = False
        self._is_reasoning = start.initial_state == "reasoning"
        self._ranks = ranks
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def is_unread(self) -> bool:
        """Whether so many events wait that no more are to come."""
        return self._events.qsize() >= MOST_UNREAD

    @property
    def has_gone_on(self) -> bool:
        """Whether the job that works on it has brought a token, or it is over."""
        return self.is_over or len(self.tokens) > self._had

    def suspect(self) -> None:
        """Note that the ranks were lost, maybe by what it makes them do."""
        if self._is_at_work and not self.has_gone_on:
            self.fruitless += 1
        self._is_at_work = False

    def again(self) -> Start:
        """Return what a job is told that goes on where another one ended."""
        self._had, self._is_at_work = len(self.tokens), False
        settings = self.start.settings
        if self.told_logprobs == len(self.start.prompt):
            settings = replace(settings, prompt_logprobs=None)
        self._heard_logprobs = 0
        if self.start.tells_generated and not self.tokens:
            return self.start
        return replace(
            self.start,
            generated=list(self.tokens),
            settings=settings,
            tells_generated=False,
        )

    def news(self, event: Event) -> Event:
        """Return what of an event no job before has told."""
        self._is_at_work = self._is_at_work or event.admitted
        if event.admitted and self.admitted is not None:
            event = replace(event, admitted=False, cached=0)
        if event.prompt_logprobs is not None:
            known = self.told_logprobs - self._heard_logprobs
            self._heard_logprobs += len(event.prompt_logprobs)
            new = event.prompt_logprobs[max(known, 0) :]
            event = replace(event, prompt_logprobs=new or None)
        return event

    def take(self, event: Event) -> None:
        """Note an event, and hand it to whoever iterates."""
        if event.admitted:
            self.admitted, self.cached = time.monotonic(), event.cached
        self.told_logprobs += len(event.prompt_logprobs or ())
        self.tokens += event.tokens
        if event.tokens:
            self.fruitless = 0
        kinds = [kind for kind, _ in event.pieces]
        # A token that brings no text is of the kind of the text before it.
        if "reasoning" in kinds or (self._is_reasoning and not kinds):
            self.reasoning_tokens += len(event.tokens)
        if kinds:
            self._is_reasoning = kinds[-1] == "reasoning"
        self.is_over = event.finish is not None
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield each event; the last one has a `finish`.

        Raises: Mistake or Unavailable where that is "error".
        """
        while True:
            event = await self._events.get()
            if event.finish == "error":
                error = Mistake if event.is_mistake else Unavailable
                raise error(event.error)
            yield event
            if event.finish is not None:
                return

    def cancel(self) -> None:
        """Let the ranks forget the request; nothing happens if it is over."""
        if not self.is_over:
            self.is_over = True
            self._ranks.cancel(self.start.id)


@dataclass
class _Call:
    """A call that is not answered yet.

    `fruitless` counts the jobs that were lost while they had it; `is_sent`: this job
    has it; `is_wanted`: its client is there.
    """

    message: messages.Call
    result: asyncio.Future[Any]
    is_sent: bool = False
    is_wanted: bool = True
    fruitless: int = 0

    def fail(self, words: str) -> None:
        """Tell its client that there is no answer to come."""
        if not self.result.done():
            self.result.set_exception(Unavailable(words))


class Ranks:
    """The connection to rank 0: calls, requests, and what it says of itself.

    `state` is "starting" until rank 0 has come, "loading" until the model is there,
    then "ready". Where a job has ended by itself it is "recovering" until the next one
    is ready, and "waiting" while there are too few hosts for one. It is "draining"
    while no more requests are taken, and "ended" at the end. `words` says more to
    people. Requests and calls outlive a job: they are handed to the next one. Each of
    `observers` is called with a generation and None when it starts, with each `Event`,
    and, where a client has gone, with one whose `finish` is "cancelled".
    """

    def __init__(self) -> None:
        self.state: State = "starting"
        self.words = "the ranks start"
        self.done: float | None = None
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        # The last of them, each with its time.
        self.recent_stats: deque[tuple[float, Stats]] = deque(maxlen=20)
        self.generations: dict[str, Generation] = {}
        self.observers: list[Callable[[Generation, Event | None], None]] = []
        self.missing: dict[str, str] = {}  # hosts that are lost, and why
        self.losses = 0  # jobs that ended by themselves
        self.is_draining = False
        self._reason = ""  # for which a job follows another
        self.has_come = asyncio.Event()  # rank 0 of the job that runs
        self.is_ready = asyncio.Event()
        self.is_gone = asyncio.Event()  # rank 0, that was there
        self.refusal: str | None = None  # why a job could not load the model
        self._folder: Path | None = None  # of the job that runs
        self._key = ""
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._room_for_calls = asyncio.Semaphore(CALLS_AT_ONCE)
        # Of those that were handed in again: who has not gone on, and who waits for it.
        self._awaited: list[Generation] = []
        self._held: deque[Generation] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Let jobs come in this block; at its end nothing is left."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close."""
        await self.close()

    async def listen(self) -> Path:
        """Wait in the background for rank 0 of the next job.

        Each job has a folder and a key of its own: systems remove what lies among
        temporary files for days.

        Returns: the folder, for this user alone, that rank 0 has to be told.

        Raises: OSError if there can be none.
        """
        self._stop_listening()
        folder = self._folder = Path(tempfile.mkdtemp(prefix="mlxtp-"))
        self._key = secrets.token_hex(32)
        key = os.open(folder / messages.KEY_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(key, "w") as file:
            file.write(self._key)
        self._server = await asyncio.start_unix_server(
            self._serve, folder / messages.SOCKET_NAME, limit=messages.LONGEST_LINE
        )
        return folder

    async def close(self) -> None:
        """End the ranks in order, if they are there, and remove the folder."""
        self.state = "ended"
        self._send(messages.End())
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def call(self, name: str, **arguments: Any) -> Any:
        """Call a method of `serve.ranks.text.Text` on rank 0.

        A call waits here until rank 0 has room for it: one whose client goes meanwhile
        is never sent. One that was sent keeps its room until it is answered.

        Raises: Mistake for what is wrong in the arguments; Unavailable where no rank 0
            is there, and none is to come.
        """
        self._check()
        await self._room_for_calls.acquire()
        try:
            self._check()
        except Unavailable:
            self._room_for_calls.release()
            raise
        number = next(self._numbers)
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = _Call(messages.Call(number, name, arguments), result)
        self._calls[number] = call
        result.add_done_callback(lambda done: self._called(number, done))
        call.is_sent = self._send(call.message)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            call.is_wanted = False
            raise

    def _called(self, number: int, done: asyncio.Future[Any]) -> None:
        """Note that a call has been answered, or will not be."""
        del self._calls[number]
        self._room_for_calls.release()
        if not done.cancelled():
            done.exception()  # its client may be gone: asyncio would print it

    def start(self, start: Start) -> Generation:
        """Hand a request to the ranks.

        Raises: Unavailable where no rank 0 is there, and none is to come.
        """
        self._check()
        generation = Generation(start, self)
        self.generations[start.id] = generation
        self._send(start)
        self._observe(generation, None)
        return generation

    def running_and_waiting(self) -> tuple[int, int]:
        """Count the requests that were admitted, and those that were not."""
        admitted = [g.admitted is not None for g in self.generations.values()]
        return sum(admitted), len(admitted) - sum(admitted)

    def cancel(self, request_id: str) -> None:
        """Let the ranks forget a request."""
        generation = self.generations.pop(request_id, None)
        if generation is not None:
            self._observe(generation, Event(request_id, finish="cancelled"))
        self._send(messages.Cancel(request_id))
        self._go_on_with_held()

    def end_job(self) -> None:
        """Let the job end in order; all goes on in the next one."""
        self._send(messages.End())
        self.is_ready.clear()
        self.state = "recovering"

    def suspect(self) -> None:
        """Note that the ranks were lost, maybe by what a request makes them do."""
        # Rank 0 answers one after the other: it was at the first.
        first = next((call for call in self._calls.values() if call.is_sent), None)
        if first is not None:
            first.fruitless += 1
        for generation in self.generations.values():
            generation.suspect()

    def recover(self, words: str, state: State = "recovering") -> None:
        """Note that the job has ended and another one is to come: all goes on then."""
        self._reason = words
        self._disconnect(state, words)

    def lost(self, words: str) -> None:
        """Note that there will be no other job: fail all that is under way."""
        self._disconnect("ended", words)
        self.fail(words)

    def fail(self, words: str) -> None:
        """Fail all that is under way."""
        for call in self._calls.values():
            call.fail(words)
        for request_id in list(self.generations):
            self._take(Event(request_id, finish="error", error=words))

    def _disconnect(self, state: State, words: str) -> None:
        if self._writer is not None:
            self._writer.close()  # so that `_serve` ends too
        self._writer, self.state, self.words, self.done = None, state, words, None
        for call in self._calls.values():
            call.is_sent = False
        self.stats, self.refusal = None, None
        self.recent_stats.clear()
        self.has_come.clear()
        self.is_ready.clear()
        self.is_gone.clear()

    def _check(self) -> None:
        """Look whether there is a rank 0, or one is to come.

        Raises: Unavailable if not.
        """
        if self.ready is None or self.state in ("waiting", "ended"):
            raise Unavailable(self.words)

    def _hand_in(self) -> None:
        """Let a new job go on with all that is under way."""
        for call in self._calls.values():
            if not call.is_wanted:
                call.result.cancel()
            elif call.fruitless == MOST_FRUITLESS_CALLS:
                call.fail(f"the ranks were lost {call.fruitless} times in turn with it")
            else:
                call.is_sent = self._send(call.message)
        held = deque[Generation]()
        self._held.clear()
        self._awaited.clear()
        for generation in list(self.generations.values()):
            if generation.fruitless == MOST_FRUITLESS - 1:
                held.append(generation)
            else:
                self._go_on_with(generation)
        self._held = held
        self._go_on_with_held()

    def _go_on_with(self, generation: Generation) -> None:
        """Hand one request to a job that has not heard of it."""
        start = generation.again()
        if generation.fruitless == MOST_FRUITLESS:
            words = (
                f"the ranks were lost {MOST_FRUITLESS} times in turn while they worked "
                "on this request, without a token of it"
            )
            self._take(Event(start.id, finish="error", error=words))
        else:
            self._awaited.append(generation)
            self._send(start)

    def _go_on_with_held(self) -> None:
        """Hand in the next request that is held back, if all others have gone on.

        So one that ends the ranks ends them when nobody else waits for a first token.
        """
        self._awaited = [g for g in self._awaited if not g.has_gone_on]
        while self._held and not self._awaited:
            generation = self._held.popleft()
            if not generation.is_over:
                self._go_on_with(generation)

    def _observe(self, generation: Generation, event: Event | None) -> None:
        for observer in self.observers:
            observer(generation, event)

    def _send(self, message: messages.Message) -> bool:
        """Tell rank 0 something, if it is there and knows the model; say whether."""
        if self._writer is None or not self.is_ready.is_set():
            return False
        self._writer.write(messages.encoded(message))
        return True

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Take what one connection sends: rank 0's, which says the key first."""
        try:
            # At the end of the program it is cancelled, which asyncio would print.
            with suppress(ValueError, OSError, asyncio.CancelledError):
                hello = messages.decoded(await reader.readline())
                if (
                    not isinstance(hello, messages.Hello)
                    or not hmac.compare_digest(hello.key, self._key)
                    or self._writer is not None
                ):
                    return
                self._writer = writer
                self.has_come.set()
                if self.ready is None:
                    self.state = "loading"
                while (line := await reader.readline()) and self._writer is writer:
                    self._hear(messages.decoded(line))
        finally:
            writer.close()
            if self._writer is writer:
                self._writer = None
                if self.state == "ready":
                    self.state, self.words = "recovering", "the ranks have gone"
                self.is_ready.clear()
                self.is_gone.set()

    def _hear(self, message: messages.Message) -> None:
        match message:
            case messages.Events(events):
                for event in events:
                    self._take(event)
            case messages.Answer(call, result, error):
                asked = self._calls.get(call)
                if asked is not None and not asked.result.done():
                    if error is None:
                        asked.result.set_result(result)
                    else:
                        asked.result.set_exception(Mistake(error))
            case messages.Stats():
                self.stats = message
                self.recent_stats.append((time.monotonic(), message))
            case messages.State(words, done):
                self.words = f"{self._reason}; {words}" if self._reason else words
                self.done = done
            case messages.Ready():
                self.state = "draining" if self.is_draining else "ready"
                self.ready, self.words, self.done = message, "ready", 1.0
                self.is_ready.set()
                self._hand_in()
            case messages.Refused(words):
                self.refusal = words

    def _take(self, event: Event) -> None:
        generation = self.generations.get(event.id)
        if generation is None:
            return  # cancelled
        if generation.is_unread and event.finish is None:
            self._send(messages.Cancel(event.id))
            words = f"the client is {MOST_UNREAD:,} events of this answer behind"
            event = Event(event.id, finish="error", error=words)
        event = generation.news(event)
        generation.take(event)
        self._observe(generation, event)
        if event.finish is not None:
            del self.generations[event.id]
        if self._held:
            self._go_on_with_held()

"""What this rank does, as it tells the others with its heartbeat."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from mlxtp.cluster.verdict import CollectiveCall, Verdict
from mlxtp.comm.errors import RankLostError


class Blocks(NamedTuple):
    """How many blocks, such as forward passes, a rank has left, and how.

    `ended` counts all, `raised` those that an exception ended; `raised_at` is how many
    collectives the rank had called at the last exception.
    """

    ended: int = 0
    raised: int = 0
    raised_at: int = 0


class GraphState(NamedTuple):
    """What the native core does of the collectives that stand in MLX's graph.

    `begun` is the number of the last one that it has begun, 0 before the first, and
    `name` and `layer` are those of that one. `seconds` is how long it has been waiting
    in it, -1 while it is in none. `failure` says which one failed, and why: "" if none
    did; after one that did none is made any more. Where it makes two at once, name,
    layer and seconds are those of the one that it has been in for longer, and `number`
    is its number; 0 says that it is `begun`.
    """

    begun: int = 0
    name: str = ""
    layer: str = ""
    seconds: float = -1.0
    failure: str = ""
    number: int = 0


class Wait(NamedTuple):
    """A wait in a collective: since when (seconds of the monotonic clock), and which.

    `in_graph` says whether the native core waits, rather than the main thread.
    """

    since: float
    name: str
    number: int
    layer: str
    in_graph: bool

    def call(self) -> CollectiveCall:
        """Return the collective that is waited for."""
        return CollectiveCall(self.name, self.number, self.layer, waiting=True)


class Progress:
    """The collectives that the main thread has called; other threads may read it.

    `number` counts them, those in MLX's graph too. `graph` tells what has become of
    these; it is called by the heartbeat's thread, at any time, so it must not block. By
    default nothing is known of them. `limited_since` is since when waits have a limit
    of time (seconds of the monotonic clock), None while they have none. `blocks` are
    those of `Communicator.raising_together`. `lost` is the verdict after which no
    collective works, and `has_raised` whether the program was told of it. With
    `stop_graph` MLX calls a function, which raises, instead of waiting in its graph.
    """

    def __init__(self) -> None:
        self.number = 0
        self._turn: Iterator[int] | None = None
        self.graph: Callable[[], GraphState] = GraphState
        self.limited_since: float | None = 0.0
        self.blocks = Blocks()
        self.lost: Verdict | None = None
        self.has_raised = False
        self.stop_graph: Callable[[str, Callable[[], None]], None] = lambda *_: None
        # Each is one assignment, so that a reader never sees parts of two calls.
        self._wait: Wait | None = None
        self._last: tuple[str, int, str, bool] | None = None

    def waits(self) -> list[Wait]:
        """Return the waits of the main thread and of the native core, if they wait."""
        main, graph = self._wait, self.graph()
        waits = [] if main is None else [main]
        if graph.seconds >= 0:
            since = time.monotonic() - graph.seconds
            number = graph.number or graph.begun
            waits.append(Wait(since, graph.name, number, graph.layer, True))
        return waits

    def last_call(self) -> CollectiveCall | None:
        """Return the last collective that was called; None before the first.

        It has no number while it stands in MLX's graph and is not known to have begun.
        Whether this rank is still in it, `waits` says.
        """
        if self._last is None:
            return None
        name, number, layer, in_graph = self._last
        is_begun = not in_graph or number <= self.graph().begun
        return CollectiveCall(name, number if is_begun else None, layer, waiting=False)

    def lose(self, verdict: Verdict) -> None:
        """Let all collectives raise RankLostError, those that are waited for, too."""
        self.lost = verdict
        self.stop_graph(verdict.sentence(), self.raise_if_lost)

    def raise_if_lost(self) -> None:
        """Raise RankLostError if a rank is lost."""
        if self.lost is not None:
            self.has_raised = True
            raise RankLostError(self.lost)

    @contextmanager
    def collective(self, name: str, layer: str = "") -> Iterator[None]:
        """Note that the main thread is in a collective, for the block.

        Raises: RankLostError if a rank is lost.
        """
        self.raise_if_lost()
        self.number += 1
        self._last = name, self.number, layer, False
        self._wait = Wait(time.monotonic(), name, self.number, layer, False)
        try:
            yield
        finally:
            self._wait = None

    def put_in_graph(self, name: str, layer: str) -> int:
        """Note a collective that MLX will wait for when it evaluates the graph.

        Returns its number, which counts in the order in which they are begun.

        Raises: RankLostError if a rank is lost.
        """
        self.raise_if_lost()
        self.number += 1
        number = self.number if self._turn is None else next(self._turn)
        self._last = name, number, layer, True
        return number

    @contextmanager
    def turns(self) -> Iterator[Callable[[int], None]]:
        """Number what two computations call as it is begun: by turns.

        Gives a function that says which of them calls from now on: 0 or 1.
        """
        numbers = [count(self.number + 1, 2), count(self.number + 2, 2)]

        def call(place: int) -> None:
            self._turn = numbers[place]

        try:
            yield call
        finally:
            self._turn = None
            # One that calls less than the other leaves numbers out.
            self.number = max(self.number, max(map(next, numbers)) - 2)

    def end_block(self, *, raised: bool) -> None:
        """Note that the main thread has left a block, with an exception or not."""
        ended, number, at = self.blocks
        if raised:
            number, at = number + 1, self.number
        # One assignment: a reader never sees a block that has ended but not raised.
        self.blocks = Blocks(ended + 1, number, at)

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let waits in the block take as long as they take, while ranks load, say.

        One of the native core may outlast the block: its time counts from the end.
        """
        before, self.limited_since = self.limited_since, None
        try:
            yield
        finally:
            self.limited_since = None if before is None else time.monotonic()

"""Two computations in one graph whose collectives take turns.

While what one has sent travels, the other computes. The graphs of both are made before
any is evaluated, so they are those of computations one after the other, to the bit.
Then the first collective of each is begun, the second of each, and so on: what computes
their inputs comes in that order, too.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import mlx.core as mx

T = TypeVar("T")


class Turn(NamedTuple):
    """One of two computations: `place` is 0 or 1.

    `called` has an output of each of its collectives, by which they are begun.
    """

    place: int
    called: deque[mx.array]


# State of the call: other threads are in no turn.
_TURN: ContextVar[Turn | None] = ContextVar("_TURN", default=None)


def place() -> int:
    """Return the place of the computation that calls, 0 where none takes turns."""
    turn = _TURN.get()
    return 0 if turn is None else turn.place


def note(x: mx.array) -> None:
    """Note an output of a collective that was called, to be begun in turn."""
    turn = _TURN.get()
    if turn is not None:
        turn.called.append(x)


def take_turns(
    first: Callable[[], T],
    second: Callable[[], T],
    prepare: Callable[[int], None],
    finish: Callable[[list[mx.array | None]], None] = lambda last: None,
) -> tuple[T, T]:
    """Put two computations into the graph, and begin their collectives by turns.

    `prepare(place)` is called before each, and `finish` at the end, with the output
    that was begun last of each. What was called is begun where one raises, too: other
    ranks wait for it.
    """
    assert _TURN.get() is None, "turns within turns"
    turns = Turn(0, deque()), Turn(1, deque())
    try:
        with _in_turn(turns[0], prepare):
            of_first = first()
        with _in_turn(turns[1], prepare):
            of_second = second()
    finally:
        last: list[mx.array | None] = [None, None]
        try:
            while any(turn.called for turn in turns):
                for place, called in turns:
                    if called:
                        # The graph alone holds the rest.
                        last[place] = x = called.popleft()
                        mx.async_eval(x)  # type: ignore[no-untyped-call]
        finally:
            finish(last)
    return of_first, of_second


@contextmanager
def _in_turn(turn: Turn, prepare: Callable[[int], None]) -> Iterator[None]:
    prepare(turn.place)
    token = _TURN.set(turn)
    try:
        yield
    finally:
        _TURN.reset(token)

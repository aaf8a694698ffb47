"""Computations in one graph whose collectives take turns.

While what one has sent travels, another computes. The graphs of all are made before
any is evaluated, so they are those of computations one after the other, to the bit.
Then the first collective of each is begun, the second of each, and so on: what computes
their inputs comes in that order, too.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")

# Outputs of the collectives that a computation has called, each of which it takes to
# begin one. State of the call: other threads have none.
_CALLED: ContextVar[deque[mx.array] | None] = ContextVar("_CALLED", default=None)


def note(x: mx.array) -> None:
    """Note an output of a collective that was called, to be begun in turn."""
    called = _CALLED.get()
    if called is not None:
        called.append(x)


@contextmanager
def _noted(called: deque[mx.array]) -> Iterator[None]:
    assert _CALLED.get() is None, "turns within turns"
    token = _CALLED.set(called)
    try:
        yield
    finally:
        _CALLED.reset(token)


def take_turns(
    computations: Sequence[Callable[[], T]],
    prepare: Callable[[int], None],
    finish: Callable[[mx.array | None], None] = lambda last: None,
) -> list[T]:
    """Put computations into the graph one after the other, and begin them by turns.

    `prepare(place)` is called before each, and `finish` at the end, with the output
    that was begun last. What was called is begun where one raises, too: other ranks
    wait for it.
    """
    turns = [deque[mx.array]() for _ in computations]
    results: list[T] = []
    try:
        for place, compute in enumerate(computations):
            prepare(place)
            with _noted(turns[place]):
                results.append(compute())
    finally:
        last = None
        while any(turns):
            for called in filter(None, turns):
                last = called.popleft()  # and held by the graph alone from now on
                mx.async_eval(last)  # type: ignore[no-untyped-call]
        finish(last)
    return results

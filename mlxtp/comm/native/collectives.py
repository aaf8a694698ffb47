"""Collectives on MLX arrays that stand in MLX's graph, made by the C++ beside this."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxtp.comm.allreduce import algorithms
from mlxtp.comm.progress import GraphState, Progress
from mlxtp.comm.request import Request
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import Transport
from mlxtp.comm.tuning import choose
from mlxtp.comm.turns import note, place, take_turns

T = TypeVar("T")


class NativeCollectives:
    """Put collectives into MLX's graph, where C++ makes them in turn.

    They are made in the order of the calls, on every rank, and what was called is made
    whether or not anybody reads it. `tuning` says which algorithm an allreduce takes
    for which size. Unless `measure` is False it is measured here, which takes about a
    second.
    """

    over = "MPI, in MLX's graph"
    is_timed = True
    takes_turns = True

    def __init__(
        self,
        cores: Sequence[Any],
        control: Transport,
        progress: Progress,
        traffic: Traffic,
        *,
        allreduce: str = "auto",
        measure: bool = True,
    ) -> None:
        """Take `cores`, this rank's parts of two communicators of C++ (`Core`).

        The second is for the second of two computations that take turns.
        """
        self._cores = cores
        self._progress = progress
        self._traffic = traffic
        progress.graph = self._state
        progress.stop_graph = self._stop
        names = algorithms(control.size, allreduce)
        self.tuning = choose(
            self._time_allreduce, control, names, progress, measure=measure
        )
        cores[0].forget()
        traffic.add_graph(cores[0].seconds)  # the second's pass beside the first's
        self._algorithm = cache(self.tuning.algorithm)
        self._gather = cache(self.tuning.gather)

    def __str__(self) -> str:
        """Tell which algorithm is taken from which size on."""
        return str(self.tuning)

    def allreduce(self, x: mx.array, at: str) -> mx.array:
        """Sum x over ranks.

        Shapes: x (...) partial -> (...) replicated, unevaluated.
        """
        return self._allreduce(x, "allreduce", at)

    def iallreduce(self, x: mx.array, at: str) -> Request:
        """Start to sum x over ranks.

        Shapes: x (...) partial -> (...) replicated, unevaluated.
        """
        total = self._allreduce(x, "iallreduce", at)
        mx.async_eval(total)  # type: ignore[no-untyped-call]
        return Request(lambda: total)

    def _allreduce(self, x: mx.array, name: str, at: str) -> mx.array:
        number = self._counted(x, name, at)
        algorithm = self._algorithm(x.nbytes)
        return self._called(self._core.allreduce(x, algorithm, number, name, at))

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str) -> mx.array:
        """Join the ranks' arrays along the last axis, in rank order.

        Shapes: x (..., sizes[rank]) sharded -> (..., sum(sizes)) replicated,
        unevaluated.
        """
        number = self._counted(x, "allgather", at)
        column_bytes = math.prod(x.shape[:-1]) * x.itemsize
        algorithm = self._gather(column_bytes * max(sizes))
        return self._called(self._core.allgather(x, sizes, algorithm, number, at))

    def bcast(self, x: mx.array, root: int, at: str) -> mx.array:
        """Give every rank the x of `root`.

        Shapes: x (...) -> (...) replicated, unevaluated.
        """
        number = self._counted(x, "bcast", at)
        algorithm = self._gather(x.nbytes)
        return self._called(self._core.bcast(x, root, algorithm, number, at))

    def take_turns(
        self, first: Callable[[], T], second: Callable[[], T]
    ) -> tuple[T, T]:
        """Put two computations into the graph, and begin their collectives by turns.

        Each has a communicator and a stream of its own: so two collectives may be under
        way, and the processor goes on with what it has to compute.
        """
        before = self._cores[0].token()

        def prepare(place: int) -> None:
            call(place)
            self._cores[place].follow(before, True)

        def finish(last: list[mx.array | None]) -> None:
            self._cores[1].follow(None, False)
            self._cores[0].follow(before if last[0] is None else last[0], False)

        with self._progress.turns() as call:
            return take_turns(first, second, prepare, finish)

    @property
    def _core(self) -> Any:
        """The one of the computation that calls."""
        return self._cores[place()]

    def _state(self) -> GraphState:
        """Tell what the cores do, of two waits that which has lasted longer."""
        states = [GraphState(*core.state()) for core in self._cores]
        begun = max(state.begun for state in states)
        failure = "; ".join(filter(None, (state.failure for state in states)))
        longest = max(states, key=lambda state: (state.seconds, state.begun))
        return longest._replace(begun=begun, failure=failure, number=longest.begun)

    def _stop(self, words: str, error: Callable[[], None]) -> None:
        """Let every collective fail, those that are under way too."""
        for core in self._cores:
            core.stop(words, error)

    def _time_allreduce(self, x: np.ndarray, algorithm: str) -> None:
        """Sum x (n,) over ranks, outside of the graph."""
        self._cores[0].time_allreduce(x, algorithm, self._progress.number)

    def flush(self) -> None:
        """Begin to make what was called: another rank may wait for it."""
        self._core.flush()

    def close(self) -> None:
        """Make what was called, and part from the other ranks."""
        for core in self._cores:
            core.close()

    def _called(self, result: mx.array) -> mx.array:
        """Note that a collective was put into the graph; return its result."""
        note(self._core.token())
        return result

    def _counted(self, x: mx.array, name: str, at: str) -> int:
        """Count a collective as called; return its number."""
        self._traffic.count(x.nbytes)
        return self._progress.put_in_graph(name, at)

"""Where partial outputs are summed over ranks, and when they need not be."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator

# partial (...) -> replicated (...)
Sum = Callable[[mx.array], mx.array]

# State of the call that is being made, never of the model: calls of other threads and
# of other streams have their own.
_UNREAD: ContextVar[bool] = ContextVar("_UNREAD", default=False)
_PARTS: ContextVar[Mapping["JointSum", dict[str, mx.array]] | None] = ContextVar(
    "_PARTS", default=None
)


@contextmanager
def outputs_unread() -> Iterator[None]:
    """Call a model for its caches alone: nobody reads what it returns.

    In such a call the layers that no cache depends on do not communicate, and outputs
    have the right shape alone. Put it around each call of a model, and never around a
    `yield`: a variable of the context that a generator sets is its caller's too.
    """
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def are_outputs_unread() -> bool:
    """Whether the model is being called for its caches alone."""
    return _UNREAD.get()


@dataclass(frozen=True, eq=False)
class JointSum:
    """One allreduce for the outputs of several places that a module only adds.

    Put around the module's forward pass (`change_forward`). In each call every place
    but the last gives zeros and leaves its partial output to it; the last sums them all
    over ranks and gives the whole. The partial outputs belong to the call.

    Raises: AssertionError if a place comes twice in a call, or if not all come.
    """

    comm: Communicator
    places: tuple[str, ...]

    def __call__(
        self, former: Callable[..., Any], module: nn.Module, *args: Any, **options: Any
    ) -> Any:
        """Call the module around the places."""
        parts: dict[str, mx.array] = {}
        token = _PARTS.set({**(_PARTS.get() or {}), self: parts})
        try:
            y = former(module, *args, **options)
        finally:
            _PARTS.reset(token)
        assert not parts or parts.keys() == set(self.places), (
            f"of {', '.join(self.places)} only {', '.join(parts)} came to be summed"
        )
        return y

    def add(self, x: mx.array, path: str) -> mx.array:
        """Take the partial output of one of the places.

        Shapes: x (...) partial -> zeros (...), or the sum (...) replicated.
        Communicates: one allreduce of x's elements at the last place.
        """
        parts = (_PARTS.get() or {}).get(self)
        assert parts is not None, f"{path} was called outside of the module around it"
        assert path in self.places and path not in parts, f"{path} came twice"
        parts[path] = x
        if len(parts) < len(self.places):
            return mx.zeros_like(x)
        whole = functools.reduce(operator.add, parts.values())
        return self.comm.allreduce(whole, path)


@dataclass(frozen=True)
class SumOverRanks:
    """The sum of the ranks' partial outputs at one place of a model.

    Args:
        path: of the layer in the model.
        feeds_caches: whether a cache depends on the output; if not, it is left partial
            in calls whose outputs nobody reads.
        joint: where the sum is made together with those of other places.

    Shapes: x (...) partial -> (...) replicated.
    Communicates: one allreduce of x's elements.
    """

    comm: Communicator
    path: str
    feeds_caches: bool = True
    joint: JointSum | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """Sum x over ranks."""
        if are_outputs_unread() and not self.feeds_caches:
            return x
        if self.joint is not None:
            return self.joint.add(x, self.path)
        return self.comm.allreduce(x, self.path)


@dataclass(frozen=True)
class SummedOutput:
    """The forward pass of a module whose output is a sum of partial ones.

    Communicates: one allreduce of what the module returns.
    """

    sum_over_ranks: Sum

    def __call__(
        self, former: Callable[..., Any], module: nn.Module, *args: Any, **options: Any
    ) -> mx.array:
        """Call the module and sum its output over ranks."""
        return self.sum_over_ranks(former(module, *args, **options))

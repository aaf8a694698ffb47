"""Slices of tensors, read by threads ahead of what is made of them."""

from collections import deque
from collections.abc import Iterable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.native import loader
from mlxtp.partition.spans import Slice

READERS = 4
# A slice is read in parts of this size, so that all threads read a large one.
PART_BYTES = 8 * 1024 * 1024
# The next slice is begun while fewer bytes than this are being read or wait to be
# converted, besides the one that is waited for. Slices that stay in memory taken before
# are no more memory: of them so many are begun.
AHEAD_BYTES = 32 * 1024 * 1024
AHEAD_SLICES = 64


@dataclass(frozen=True)
class _UnderWay:
    """A slice that is being read: its array, and the parts that are not yet read."""

    tensor: Tensor
    part: Slice
    array: mx.array
    parts: list[Future[None]]
    nbytes: int  # that it adds to what is held; 0 where its memory was taken before


class ReadAhead:
    """Reads slices like `Checkpoint.read`, some before they are asked for.

    `wanted` is what will be asked for, in that order. What is asked for out of turn is
    read then. `kept` are those of its tensors whose arrays stay when they are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        wanted: Iterable[tuple[Tensor, Slice]],
        kept: Set[Tensor] = frozenset(),
    ) -> None:
        self._checkpoint = checkpoint
        # Memory that stays, and that nothing is written to yet, is taken before threads
        # read: the system makes who takes memory wait for who fills some.
        self._wanted = iter(
            [
                (tensor, part, _array(tensor, part) if early else None)
                for tensor, part in wanted
                for early in [tensor in kept and loader.reading() is not None]
            ]
        )
        self._under_way: deque[_UnderWay] = deque()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(READERS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, tensor: Tensor, part: Slice) -> mx.array:
        """Wait for a slice, or read it. Errors as in `StoredTensor.read`."""
        self._begin()
        following = self._under_way[0] if self._under_way else None
        if following is None or (following.tensor, following.part) != (tensor, part):
            return self._checkpoint.read(tensor, part)
        self._under_way.popleft()
        self._bytes -= following.nbytes
        self._begin()
        for read in following.parts:
            read.result()
        return following.array

    def _begin(self) -> None:
        """Begin to read the next slices, as far as the limits go."""
        while self._bytes < AHEAD_BYTES and len(self._under_way) < AHEAD_SLICES:
            if (following := next(self._wanted, None)) is None:
                return
            tensor, part, taken = following
            array, memory = taken or _array(tensor, part)
            plan = self._checkpoint.tensors[tensor.name].plan(part)
            parts = [
                self._pool.submit(piece.fill, memory[slice(*place)])
                for place, piece in plan.parts(PART_BYTES)
            ]
            nbytes = 0 if taken else array.nbytes
            self._under_way.append(_UnderWay(tensor, part, array, parts, nbytes))
            self._bytes += nbytes


def _array(tensor: Tensor, part: Slice) -> tuple[mx.array, np.ndarray]:
    """Make the array of a slice, to be filled, and a view of its memory."""
    return allocate(part.shape, tensor.dtype)

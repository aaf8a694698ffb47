"""Slices of tensors, read by threads ahead of what is made of them."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.partition.spans import Slice

READERS = 4
# The next slice is begun while fewer bytes than this are being read or wait to be
# converted.
AHEAD_BYTES = 32 * 1024 * 1024


class ReadAhead:
    """Reads slices like `Checkpoint.read`, some before they are asked for.

    `wanted` is what will be asked for, in that order. What is asked for out of turn is
    read then.
    """

    def __init__(
        self, checkpoint: Checkpoint, wanted: Iterable[tuple[Tensor, Slice]]
    ) -> None:
        self._checkpoint = checkpoint
        self._wanted = iter(wanted)
        self._under_way: deque[tuple[Tensor, Slice, mx.array, Future[None]]] = deque()
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
        if not self._under_way or self._under_way[0][:2] != (tensor, part):
            return self._checkpoint.read(tensor, part)
        *_, array, done = self._under_way.popleft()
        self._bytes -= array.nbytes
        done.result()
        self._begin()
        return array

    def _begin(self) -> None:
        """Begin to read the next slices, as far as AHEAD_BYTES go."""
        while self._bytes < AHEAD_BYTES:
            if (following := next(self._wanted, None)) is None:
                return
            tensor, part = following
            array, memory = allocate(part.shape, tensor.dtype)
            done = self._pool.submit(self._fill, memory, tensor, part)
            self._under_way.append((tensor, part, array, done))
            self._bytes += array.nbytes

    def _fill(self, memory: np.ndarray, tensor: Tensor, part: Slice) -> None:
        self._checkpoint.tensors[tensor.name].plan(part).fill(memory)

"""How an allreduce is made, and which way is taken for which size.

Every way adds the ranks' parts in rank order, in float32 for 16-bit types, so
the result is the same to the bit on every rank and whatever the way.
"""

import numpy as np

from mlxtp.transports import Transport

# Up to here (bytes that a rank receives in one step) fewer steps win, above it fewer
# bytes: measured in shared memory on 2 and 5 ranks.
EXCHANGE_LIMIT = 256 * 1024


class Allreduce:
    """Sums of equal arrays over all ranks, into buffers that are kept."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._memory = np.empty(0, np.uint8)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Sum `x` (n,) over ranks."""
        if x.nbytes * (self._transport.size - 1) <= EXCHANGE_LIMIT:
            return self._exchange(x)
        return self._scatter_gather(x)

    def _exchange(self, x: np.ndarray) -> np.ndarray:
        """One step: everyone gets every part and sums. Receives size * n elements."""
        parts = self._buffer((self._transport.size, x.size), x.dtype)
        self._transport.allgather(x, parts)
        return sum_in_rank_order(parts)

    def _scatter_gather(self, x: np.ndarray) -> np.ndarray:
        """Two steps: a rank sums its block, then gathers the others' sums.

        Receives about 2 * n elements, however many ranks there are.
        """
        size, rank = self._transport.size, self._transport.rank
        counts = [x.size // size + (r < x.size % size) for r in range(size)]
        parts = self._buffer((size, counts[rank]), x.dtype)
        self._transport.alltoallv(x, counts, parts)
        result = np.empty_like(x)
        self._transport.allgatherv(sum_in_rank_order(parts), result, counts)
        return result

    def _buffer(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if self._memory.size < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(shape)


def sum_in_rank_order(parts: np.ndarray) -> np.ndarray:
    """Add the rows of `parts` (ranks, n), the first rank's first."""
    narrow_float = parts.dtype.itemsize == 2 and parts.dtype.kind not in "iu"
    total = parts[0].astype(np.float32 if narrow_float else parts.dtype)
    for part in parts[1:]:
        np.add(total, part, out=total, casting="same_kind")
    return total.astype(parts.dtype, copy=False)

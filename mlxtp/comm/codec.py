"""Which bytes of an array are sent, and how the parts of all ranks are added."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

# Elements that share a scale in `Int8Codec`. Blocks of an array are cut between groups.
GROUP_SIZE = 64


class Codec(Protocol):
    """Turn a rank's part into bytes, and the bytes of all ranks into their sum.

    Sums are made in rank order, in float32 for 16-bit floats, so every rank that
    adds the same bytes gets the same bits.
    """

    def nbytes(self, size: int) -> int:
        """Return how many bytes `size` elements take."""
        ...

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Return the bytes of an array; they may be its own memory.

        Shapes: x (n,) -> (nbytes(n),) uint8.
        """
        ...

    def sum(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Add the encoded parts, which are in rank order, into `out`.

        Shapes: parts, each (nbytes(n),) uint8; out (n,).
        """
        ...


class PlainCodec:
    """Send every element as it is."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._wide = np.empty(0, np.float32)

    def nbytes(self, size: int) -> int:
        """Return how many bytes `size` elements take."""
        return size * self._dtype.itemsize

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Return the memory of x (n,)."""
        return x.view(np.uint8)

    def sum(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Add the parts into `out` (n,), in float32 for 16-bit floats."""
        typed = [part.view(self._dtype) for part in parts]
        if not _is_narrow_float(self._dtype):
            np.add(typed[0], typed[1], out=out)
            for part in typed[2:]:
                np.add(out, part, out=out)
            return
        if self._wide.size < out.size:
            self._wide = np.empty(out.size, np.float32)
        wide = self._wide[: out.size]
        # MLX's NaN is one in float16 that numpy would warn of.
        with np.errstate(invalid="ignore"):
            np.copyto(wide, typed[0])
            for part in typed[1:]:
                np.add(wide, part, out=wide, casting="same_kind")
        np.copyto(out, wide, casting="unsafe")


class Int8Codec:
    """Send groups of 64 elements as int8 with a float32 scale each (an experiment).

    1.06 bytes an element. x = q * s, with s = max(|x|) / 127 over the group: each
    element is off by at most s / 2. Sums are made in float32.
    """

    def nbytes(self, size: int) -> int:
        """Return how many bytes `size` elements take, with their scales."""
        return 4 * _groups(size) + size

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Return the scales and the 8-bit integers of x (n,)."""
        encoded = np.empty(self.nbytes(x.size), np.uint8)
        groups = np.zeros((_groups(x.size), GROUP_SIZE), np.float32)
        groups.reshape(-1)[: x.size] = x
        scales, numbers = self._split(encoded, x.size)
        np.divide(np.abs(groups).max(axis=1, initial=0), 127, out=scales)
        groups /= np.where(scales > 0, scales, 1)[:, None]
        np.rint(groups, out=groups)
        numbers[:] = groups.reshape(-1)[: x.size]
        return encoded

    def sum(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Add the parts into `out` (n,), in float32."""
        total = self._decode(parts[0], out.size)
        for part in parts[1:]:
            total += self._decode(part, out.size)
        np.copyto(out, total, casting="unsafe")

    def _decode(self, part: np.ndarray, size: int) -> np.ndarray:
        scales, numbers = self._split(part, size)
        return numbers * np.repeat(scales, GROUP_SIZE)[:size]

    def _split(self, encoded: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return views of the scales and of the numbers of `size` elements."""
        middle = 4 * _groups(size)
        return encoded[:middle].view(np.float32), encoded[middle:].view(np.int8)


def _groups(size: int) -> int:
    return -(-size // GROUP_SIZE)


def _is_narrow_float(dtype: np.dtype) -> bool:
    return dtype.itemsize == 2 and dtype.kind not in "iu"

"""Rows of bytes in a file, and spans of each: how they are read."""

import mmap
import os

import numpy as np

from mlxtp.partition.spans import Spans

# Pieces that lie closer together than a page are read with what is between them:
# the disk reads the page anyway.
PAGE_BYTES = mmap.PAGESIZE
# The most that is read at once into memory which is not the array's own: it stays in
# a core's cache.
BLOCK_BYTES = 512 * 1024


def read_rows(into: np.ndarray, fd: int, offset: int, row: int, spans: Spans) -> None:
    """Fill `into`, (rows, n) uint8, with the `spans` of each row of `row` bytes.

    Raises: OSError if the file ends early or cannot be read.
    """
    rows, gap = len(into), row - into.shape[1]
    if gap == 0 and into.flags.c_contiguous:
        return pread(fd, into.reshape(-1).data, offset)
    if rows == 1 or gap >= PAGE_BYTES:
        for number in range(rows):
            filled = 0
            for start, stop in spans:
                target = into[number, filled : filled + stop - start]
                pread(fd, target.data, offset + number * row + start)
                filled += stop - start
        return
    block = np.empty((max(1, BLOCK_BYTES // row), row), np.uint8)
    first, last = min(spans)[0], max(spans)[1]
    for number in range(0, rows, len(block)):
        some = block[: rows - number]
        # From the first span of the first row to the last span of the last.
        flat = some.reshape(-1)[first : some.size - (row - last)]
        pread(fd, flat.data, offset + number * row + first)
        take(some, into[number : number + len(some)], spans)


def take(rows: np.ndarray, into: np.ndarray, spans: Spans) -> None:
    """Put the `spans` of each row behind another."""
    filled = 0
    for start, stop in spans:
        into[:, filled : filled + stop - start] = rows[:, start:stop]
        filled += stop - start


def pread(fd: int, target: memoryview, offset: int) -> None:
    """Fill `target` from `offset` on.

    Raises: OSError if the file ends early or cannot be read.
    """
    while target:
        count = os.preadv(fd, (target,), offset)
        if count == 0:
            raise OSError(f"the file ends at byte {offset}, inside a tensor")
        target, offset = target[count:], offset + count

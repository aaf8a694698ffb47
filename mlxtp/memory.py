"""Memory for weights: how much a host has, and arrays to be filled."""

import ctypes
import io
import json
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

# Arrays below this are not worth asking for memory that nothing has touched.
LARGE_BYTES = 1024 * 1024
# Linux: pages of this size, and the advice to take them. One costs less than the 512
# small ones, both when it is first written to and in every product that reads it.
HUGE_PAGE_BYTES = 2 * 1024 * 1024
MADV_HUGEPAGE = 14


def available_bytes() -> int | None:
    """Bytes that this host can give to models; None where it does not tell.

    On a Mac what Metal lets the GPU wire (`max_recommended_working_set_size`), on
    Linux `MemAvailable` of /proc/meminfo.
    """
    if sys.platform == "darwin":
        return mx.device_info().get("max_recommended_working_set_size")
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def allocate(shape: Sequence[int], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """An array to be filled, and its memory: (n,) uint8. What it holds is undefined."""
    size = prod(shape) * dtype.size
    if size < LARGE_BYTES:
        raw = mx.zeros((size,), mx.uint8)
        mx.eval(raw)
    else:
        loaded: Any = mx.load(_Untouched(size), format="safetensors")  # type: ignore[arg-type]
        raw = loaded["raw"]
    return raw.view(dtype).reshape(shape), np.asarray(raw)


class _Untouched(io.RawIOBase):
    """A safetensors file that leaves the memory it is read into as it is.

    MLX gives no memory without writing zeros to it, which takes as long as reading a
    file from the page cache does; but it loads from any Python file.
    """

    def __init__(self, size: int) -> None:
        tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        text = json.dumps({"raw": tensor}).encode()
        self._start = len(text).to_bytes(8, "little") + text
        self._size = len(self._start) + size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}
        self._place = origin[whence] + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        start = self._start[self._place : self._place + len(target)]
        target[: len(start)] = start
        if not start:
            _take_huge_pages(np.frombuffer(target, np.uint8))
        self._place += len(target)
        return len(target)


def _take_huge_pages(memory: np.ndarray) -> None:
    if sys.platform != "linux":
        return
    first = -(-memory.ctypes.data // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (memory.ctypes.data + memory.size) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if first < last:  # only advice: whether it is taken makes no difference to us
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE
        )

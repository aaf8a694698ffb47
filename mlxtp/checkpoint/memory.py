"""Memory for weights: how much a host has, and arrays to be filled."""

import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np


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
    """Make an array of zeros to be filled, and a view of its memory.

    Shapes: the array has `shape`, its memory is (n,) uint8.
    """
    size = prod(shape) * dtype.size
    # MLX sets it to zero item by item: the fewer the better.
    wide = mx.uint64 if size % 8 == 0 else mx.uint8
    raw = mx.zeros((size // wide.size,), wide)
    mx.eval(raw)
    return raw.view(dtype).reshape(shape), np.asarray(raw).view(np.uint8)

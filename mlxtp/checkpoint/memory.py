"""MLX's memory: arrays to be filled, and what the GPU has for them."""

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np

from mlxtp.native import loader


def gpu_limit_bytes() -> int | None:
    """Return the bytes that the GPU has for models; None where MLX uses none.

    With Metal it is what the GPU may wire of the host's memory, with CUDA what is free
    on the card.
    """
    device = mx.device_info()
    limits = "max_recommended_working_set_size", "free_memory"
    return next((int(device[name]) for name in limits if name in device), None)


def allocate(shape: Sequence[int], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """Make an evaluated array to be filled, and a view of its memory.

    Anything may be in it.

    Shapes: the array has `shape`, its memory is (n,) uint8.
    """
    size = prod(shape) * dtype.size
    if size and (native := loader.reading()) is not None:
        array, memory = native.allocate(shape, dtype)
        return array, memory
    # MLX sets it to zero item by item: the fewer the better.
    wide = mx.uint64 if size % 8 == 0 else mx.uint8
    raw = mx.zeros((size // wide.size,), wide)
    array = raw.view(dtype).reshape(shape)
    mx.eval(raw, array)
    return array, np.asarray(raw).view(np.uint8)

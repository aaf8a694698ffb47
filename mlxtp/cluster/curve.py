"""Times between measured points: of an allreduce by the bytes of its parts, say."""

from bisect import bisect_right
from collections.abc import Sequence


def interpolate(size: float, sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the time for `size` on the lines between measured points.

    `sizes` ascend, with a time for each. Below the first its time holds. Above the
    last its line goes on, but never falls: nothing gets faster with size.

    >>> interpolate(15, [10, 20], [1.0, 2.0])
    1.5
    >>> interpolate(30, [10, 20], [1.0, 2.0]), interpolate(30, [10, 20], [2.0, 1.0])
    (3.0, 1.0)
    """
    if size <= sizes[0] or len(sizes) == 1:
        return seconds[0]
    right = min(bisect_right(sizes, size), len(sizes) - 1)
    left = right - 1
    rate = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
    if size > sizes[-1]:
        return seconds[-1] + max(0.0, rate) * (size - sizes[-1])
    return seconds[left] + rate * (size - sizes[left])

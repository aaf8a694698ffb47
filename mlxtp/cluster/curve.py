"""What a collective takes for sizes between those that were measured."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """The seconds that were measured for parts of `sizes` bytes, which ascend."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, nbytes: int) -> float:
        """Return the seconds for a part of `nbytes`.

        Between two sizes they lie on a line. Above the last size the line through the
        last two goes on, but never falls; below the first size it is flat.
        """
        sizes, seconds = self.sizes, self.seconds
        above = 0.0
        if len(sizes) > 1:
            rate = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            above = max(0.0, rate) * max(0, nbytes - sizes[-1])
        return float(np.interp(nbytes, sizes, seconds)) + above

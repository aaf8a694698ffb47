"""What a nonblocking collective returns."""

from collections.abc import Callable

import mlx.core as mx


class Request:
    """A nonblocking collective that is under way, or done."""

    def __init__(self, finish: Callable[[], mx.array]) -> None:
        """`finish` completes the collective; it is called once, by `wait`."""
        self._finish: Callable[[], mx.array] | None = finish
        self._result: mx.array

    def wait(self) -> mx.array:
        """Return the result, waiting for it; a second call returns it again.

        Every rank waits for the same requests in the same order.
        """
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        return self._result

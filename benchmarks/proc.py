"""What Linux says of this process: its memory, and what it has read."""

import threading
from pathlib import Path
from typing import Self


class PeakMemory:
    """The largest anonymous memory (RssAnon) within a block, looked at every 2 ms.

    `above_bytes` is what it was above the memory before, `read_bytes` what the block
    read (rchar), without what watching took.
    """

    above_bytes = 0
    read_bytes = 0

    def __enter__(self) -> Self:
        self._done = threading.Event()
        self._watched = 0
        self._before, self._read_before = self._anonymous(), read_bytes()
        self._watched = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.read_bytes = read_bytes() - self._read_before - self._watched

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            above = self._anonymous() - self._before
            self.above_bytes = max(self.above_bytes, above)

    def _anonymous(self) -> int:
        text = Path("/proc/self/status").read_text()
        self._watched += len(text)
        return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def read_bytes() -> int:
    """Return what this process has read (rchar)."""
    text = Path("/proc/self/io").read_text()
    return int(text.partition("rchar:")[2].split()[0])

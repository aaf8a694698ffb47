"""How far reading, writing and fetching have come: in bytes."""

from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

# Is told of bytes as they are done.
Advance = Callable[[int], object]


def ignore(size: int) -> None:
    """Take no notice of progress: an `Advance` for callers that show none."""


def progress_bar(what: str, total_bytes: int, *, show: bool) -> "tqdm[NoReturn]":
    """Make a progress bar of bytes, which shows nothing unless `show`."""
    return tqdm(
        total=total_bytes, unit="B", unit_scale=True, desc=what, leave=False,
        disable=not show,
    )  # fmt: skip

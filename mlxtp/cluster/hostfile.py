"""Open MPI's hostfiles: which hosts a job runs on, and how many ranks each takes.

A line is a host's name, then `slots=N` and `max_slots=N` where wanted; `#` begins a
comment. Only the standard library is used: `launch/` reads hostfiles before anything
is installed.
"""

import re
from collections import Counter
from pathlib import Path

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_LINE = re.compile(rf"({_NAME})(?: (?:slots=(\d+)|max[-_]slots=\d+))*")


def is_name(text: str) -> bool:
    """Return whether `text` may stand in a hostfile as a host's name."""
    return re.fullmatch(_NAME, text) is not None


def parse(text: str, source: str) -> dict[str, int]:
    """Return host -> slots from the text of a hostfile, in its order.

    A host that is named again gets the slots of both lines, as in Open MPI. A line
    without slots counts as one slot (Open MPI takes as many as the host has cores).

    Raises: ValueError, with `source` and the line, for what is no hostfile.
    """
    slots: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        words = " ".join(re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split())
        if not words:
            continue
        match = _LINE.fullmatch(words)
        if match is None:
            raise ValueError(
                f"{source}, line {number}: wanted a host's name and slots=N, "
                f"not {words!r}"
            )
        slots[match[1]] += int(match[2] or 1)
    if not any(slots.values()):
        raise ValueError(f"{source} names no host that takes a rank")
    return dict(slots)


def read(file: str | Path) -> dict[str, int]:
    """Return host -> slots from a hostfile, as `parse` does.

    Raises: ValueError, with the file, if it cannot be read or is no hostfile.
    """
    try:
        text = Path(file).read_text(errors="replace")
    except OSError as error:
        raise ValueError(f"no hostfile {file}: {error.strerror}") from None
    return parse(text, str(file))


def by_rank(slots: dict[str, int]) -> list[str]:
    """Return each rank's host: Open MPI fills one host's slots after another's."""
    return [host for host, count in slots.items() for _ in range(count)]


def text(slots: dict[str, int]) -> str:
    """Return the text of a hostfile for host -> slots."""
    return "".join(f"{host} slots={count}\n" for host, count in slots.items())

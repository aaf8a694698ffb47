"""How long passes take, and how much of the prompts is read beside rows. No MLX."""

from collections import deque
from statistics import median
from typing import NamedTuple

# How long reading may hold up rows that it has not held up lately. So a short prompt is
# read at once, and its row decodes with the others sooner.
PAUSE_SECONDS = 1.0

# How much reading may add to each pass besides, in passes that only decode.
PART_OF_PASS = 0.6

# It may be more where a part takes long whatever its length, as on slow links: so much
# of what could be read alone in the time of a pass that only decodes. Where a part
# takes as long as such a pass besides its tokens, the tokens of others come 2.5 times
# as slowly meanwhile, and the prompt is read 5 times as slowly.
LEAST_PART = 0.5

# The part of a prompt that is read beside rows before a pass was measured.
FIRST_PART = 32

# A measure of few tokens says little of many: at most so many times as many are read.
GROWTH = 4

# A part of so many tokens takes little besides them: about what it takes alone.
LONG_PART = 64

# What each measure leaves of those before it.
FADING = 0.75


class _Pass(NamedTuple):
    read: int = 0  # tokens of prompts
    rows: int = 0


class Pace:
    """How long passes take: what a part of a prompt may add to one.

    Times are those between two passes. A pass waits for what the one before has drawn,
    and, if both read, for what that one has read; what is read last is waited for one
    pass later, as its rows' tokens lie behind it.
    """

    def __init__(self) -> None:
        self._decode_seconds: deque[float] = deque(maxlen=32)
        self._all, self._long = _Reading(), _Reading()
        self._most_read = 0  # that was measured
        self._now = self._before = self._earlier = _Pass()
        self._left = PAUSE_SECONDS  # that reading may take in the next pass
        self._was_waited_for = False  # the pass before has waited for its own tokens

    @property
    def rows(self) -> int:
        """How many rows decode in the pass that was begun last."""
        return self._now.rows

    @property
    def decode_seconds(self) -> float | None:
        """The median of the last passes that only decode; None before the first."""
        return median(self._decode_seconds) if self._decode_seconds else None

    def part(self, most: int) -> int:
        """How many tokens of prompts to read beside rows in the next pass."""
        limit = min(most, max(FIRST_PART, GROWTH * self._most_read))
        token, long_token = self._all.token_seconds, self._long.token_seconds
        if token == 0 or long_token == 0:
            return limit
        decode = self.decode_seconds or 0.0
        least = LEAST_PART * decode / long_token
        return max(1, min(int(max(self._left / token, least)), limit))

    def begin(self, read: int, rows: int, prompts: int = 1) -> None:
        """Note what the next pass does, and how many prompts wait to be read."""
        self._earlier, self._before = self._before, self._now
        self._now = _Pass(read, rows)
        if not rows:
            self._left = PAUSE_SECONDS  # nobody is held up
            return
        spent = read * self._all.token_seconds
        # As many passes' worth as there are prompts for each row.
        earned = self._earned() * max(1.0, prompts / rows)
        left = max(self._left - spent, 0.0) + earned
        self._left = min(left, max(PAUSE_SECONDS, earned))

    def passed(self, seconds: float, *, is_waited_for: bool = False) -> None:
        """Note how long it was from the last pass to this one.

        Args:
            seconds: how long.
            is_waited_for: this pass has waited for its own tokens, as one with drafts,
                and so for all that the one before has read.
        """
        read = 0
        if self._before.read and (self._now.read or is_waited_for):
            read += self._before.read
        if self._before.rows and not self._before.read and not self._was_waited_for:
            read += self._earlier.read
        rows = 0 if self._was_waited_for else self._before.rows
        rows = self._now.rows if is_waited_for else rows
        if read:
            decode = (self.decode_seconds or 0.0) if rows else 0.0
            self._has_read(read, max(seconds - decode, 0.0))
        elif rows:
            self._decode_seconds.append(seconds)
        self._was_waited_for = is_waited_for

    def _earned(self) -> float:
        """How many seconds of reading a pass with rows allows for the next one."""
        decode = self.decode_seconds
        if decode is None:
            return FIRST_PART * self._all.token_seconds
        return PART_OF_PASS * decode

    def _has_read(self, tokens: int, seconds: float) -> None:
        """Note what it took to read so many tokens."""
        self._all.add(tokens, seconds)
        if tokens >= min(LONG_PART, self._most_read):
            self._long.add(tokens, seconds)
        self._most_read = max(self._most_read, tokens)


class _Reading:
    """What reading has taken lately."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    @property
    def token_seconds(self) -> float:
        """What a token adds to a pass; 0 before the first."""
        return self._seconds / (self._tokens or 1.0)

    def add(self, tokens: int, seconds: float) -> None:
        """Note what it took to read so many tokens."""
        self._seconds = FADING * self._seconds + seconds
        self._tokens = FADING * self._tokens + tokens

"""How many tokens each row of a batch drafts: rank 0 decides it. No MLX.

A pass is as wide as the longest draft of its rows, so rows decide together: those
draft, and so many tokens, that make most tokens a second of all. What a pass takes is
measured by the number of its rows and its width; what is accepted, by row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlxtp.generation.pays import (
    FIRST,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MARGIN,
    MOST,
    PLAIN_FIRST,
    PROVEN_ROUNDS,
    TRIAL_ROUNDS,
    Acceptance,
    Costs,
)

# Numbers of drafted tokens that are weighed against each other.
COUNTS = tuple(n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n <= MOST)

# The most tokens of all rows in a pass with drafts: their logits are there at once.
PLACES = 128

# A row that is tried again is left out once so many of its drafts are all wrong.
TRIAL_AGAIN = 2

# Trials may take this part of the time, and as long as so many passes at once.
PART_OF_TRIALS, MOST_AT_ONCE = 0.03, 4

# What each round leaves of the time that drafting has taken before.
FADING = 0.9


@dataclass
class _Row:
    """What is known of the drafts of one row."""

    pause: int = FIRST_PAUSE  # passes for which it is left out next
    acceptance: Acceptance = field(default_factory=Acceptance)
    left_out_until: int = 0  # a number of passes
    rounds: int = 0  # in a row
    has_drafted: bool = False
    trial: int = TRIAL_ROUNDS  # of drafts, one of which has to be right in part


class RowDrafts:
    """Decides how many tokens rows draft, by what passes took and what was accepted.

    A row whose drafts do not pay is left out for a while, which doubles each time. Of a
    row that comes back it is guessed what is accepted, as of a new one. Both are on
    trial, and trials take a small part of the time.

    Args:
        fixed: always so many; None for as many as pay.
        in_batches: whether several rows may draft; else a row alone.
        places: the most tokens of all rows in a pass with drafts.

    Attributes:
        rounds, drafted, accepted: drafts of all rows, and their tokens, since the
            start.
    """

    def __init__(
        self,
        fixed: int | None = None,
        *,
        in_batches: bool = True,
        places: int = PLACES,
    ) -> None:
        self.rounds = self.drafted = self.accepted = 0
        self._fixed, self._in_batches, self._places = fixed, in_batches, places
        self._rows: dict[str, _Row] = {}
        self._costs: dict[int, Costs] = {}  # by the number of rows
        self._passes = 0
        self._plain_passes: dict[int, int] = {}  # by the number of rows
        self._widest: dict[int, int] = {}  # drafts that were measured, by rows
        self._token_seconds = 0.0  # of drafting one token
        self._left = 0.0  # seconds that trials may take
        self._was_asked = self._was_drafted = False
        self._before = 0  # rows of the last pass; 0 where it read prompts

    def choose(self, room: Mapping[str, int]) -> dict[str, int]:
        """Choose how many tokens each row drafts in the next pass.

        Args:
            room: the rows that decode, and the most tokens that each may draft.

        Returns: the rows that draft.
        """
        self._passes += 1
        for name in self._rows.keys() - room.keys():
            del self._rows[name]
        if not room or (len(room) > 1 and not self._in_batches):
            return {}
        widest = min(MOST, self._places // len(room) - 1)
        most = {name: min(count, widest) for name, count in room.items()}
        most = {name: count for name, count in most.items() if count > 0}
        if self._fixed is not None:
            return {name: min(count, self._fixed) for name, count in most.items()}
        costs = self._costs_of(len(room))
        if costs is None:
            return {}
        asked = {
            name: count
            for name, count in most.items()
            if self._may_draft(self._rows.setdefault(name, _Row()))
        }
        chosen = self._best(asked, len(room), costs)
        for name in asked:
            row = self._rows[name]
            if name not in chosen:
                self._leave_out(row)
                continue
            row.rounds += 1
            if row.rounds == PROVEN_ROUNDS:
                row.pause = FIRST_PAUSE
        return chosen

    def passed(
        self,
        seconds: float | None,
        rows: int,
        width: int,
        drafted: Mapping[str, tuple[int, int]],
        draft_seconds: float,
        *,
        is_alone: bool,
    ) -> None:
        """Note what a pass took and what became of its drafts.

        Args:
            seconds: from the pass before to this one; None where that is not known.
            rows: how many decode.
            width: tokens a row; 0 where nothing was drafted.
            drafted: how many tokens each row that was asked has drafted, and how many
                of these were accepted.
            draft_seconds: what drafting took of the time.
            is_alone: no prompt was read beside it.
        """
        count = sum(count for count, _ in drafted.values())
        if count and not any(self._is_first(name) for name in drafted):
            # The first draft of a row reads its prompt.
            took = draft_seconds / count
            before = self._token_seconds or took
            self._token_seconds = FADING * before + (1 - FADING) * took
        if seconds is not None and is_alone:
            self._account(seconds, rows, width, drafted)
            if rows == self._before:
                asked = bool(drafted)
                self._measure(rows, width, seconds - draft_seconds, is_asked=asked)
        for name, (count, accepted) in drafted.items():
            self.rounds += bool(count)
            self.drafted += count
            self.accepted += accepted
            if name in self._rows:
                self._judge(self._rows[name], count, accepted)
        if not drafted:
            self._plain_passes[rows] = self._plain_passes.get(rows, 0) + 1
        self._before = rows if is_alone else 0
        self._was_asked, self._was_drafted = bool(drafted), width > 0

    def _may_draft(self, row: _Row) -> bool:
        """Whether a row is not left out, and not on trial at a bad time."""
        is_back = row.left_out_until <= self._passes
        return is_back and (row.trial == 0 or self._left >= 0)

    def _is_first(self, name: str) -> bool:
        row = self._rows.get(name)
        return row is not None and not row.has_drafted

    def _account(
        self,
        seconds: float,
        rows: int,
        width: int,
        drafted: Mapping[str, tuple[int, int]],
    ) -> None:
        """Note what drafts have saved, or cost, beside passes without them."""
        costs = self._costs_of(rows)
        plain = None if costs is None else costs.plain_seconds
        if plain is None:
            return
        self._left += PART_OF_TRIALS * seconds
        if width:
            accepted = sum(accepted for _, accepted in drafted.values())
            # A pass without drafts before it was waited for in this one.
            passes = 1 + accepted / rows + (not self._was_drafted)
            self._left += passes * plain - seconds
        self._left = min(self._left, MOST_AT_ONCE * plain)

    def _measure(
        self, rows: int, width: int, seconds: float, *, is_asked: bool
    ) -> None:
        """Note what a pass took behind another one of as many rows.

        A pass without drafts is waited for in the next one.
        """
        costs = self._costs.setdefault(rows, Costs())
        plain = costs.plain_seconds
        if width:
            drafted = width - 1
            self._widest[rows] = max(self._widest.get(rows, 0), drafted)
            if self._was_drafted:
                costs.add(drafted, seconds)
            elif plain is not None:
                costs.add(drafted, max(seconds - plain, plain))
        elif self._was_drafted:
            return  # nothing was waited for
        elif is_asked:
            costs.add(0, seconds)
        elif not self._was_asked:
            costs.add_plain(seconds)

    def _costs_of(self, rows: int) -> Costs | None:
        """What passes of so many rows take; None if it is to be measured first.

        Where that does not come about, as prompts are read all the time, those of
        another number say what drafts cost.
        """
        if self._plain_passes.get(rows, 0) < PLAIN_FIRST:
            return None
        known = [n for n, x in self._costs.items() if x.plain_seconds is not None]
        nearest = min(known, key=lambda n: abs(n - rows), default=None)
        return None if nearest is None else self._costs[nearest]

    def _judge(self, row: _Row, count: int, accepted: int) -> None:
        """Note what became of a row's draft."""
        row.acceptance.add(count, accepted)
        row.has_drafted = row.has_drafted or count > 0
        if accepted:
            row.trial = 0
        elif count and row.trial:
            row.trial -= 1
            if row.trial == 0 and self._fixed is None:
                self._leave_out(row)

    def _leave_out(self, row: _Row) -> None:
        """Leave a row out for a while.

        Rows come back together, so that few passes are wide for those that may not pay.
        """
        row.left_out_until = (self._passes // row.pause + 1) * row.pause
        row.pause = min(2 * row.pause, LONGEST_PAUSE)
        row.acceptance, row.rounds, row.trial = Acceptance(), 0, TRIAL_AGAIN

    def _best(
        self, asked: Mapping[str, int], rows: int, costs: Costs
    ) -> dict[str, int]:
        """Which of the rows are to draft how many tokens, for most tokens a second."""
        plain = costs.plain_seconds
        assert plain is not None
        alone = costs.seconds(0) or plain
        best: dict[str, int] = {}
        best_rate = MARGIN * rows / plain
        widest = max(FIRST, 2 * self._widest.get(rows, 0))
        for count in COUNTS:
            if count > widest:  # step by step, by what was measured
                break
            counts = {name: min(count, most) for name, most in asked.items()}
            if count > max(counts.values(), default=0):
                break
            wide = costs.seconds(count) or plain
            gains = sorted(((self._gain(name, n), name) for name, n in counts.items()))
            tokens, drafting, none = float(rows), 0.0, 1.0
            names = []
            for gain, name in reversed(gains):
                share = self._rows[name].acceptance.share
                tokens += gain
                none *= 1 - share
                drafting += share * counts[name] * self._token_seconds
                names.append(name)
                rate = tokens / (none * alone + (1 - none) * wide + drafting)
                if rate > best_rate:
                    best_rate = rate
                    best = {name: counts[name] for name in names}
        return best

    def _gain(self, name: str, count: int) -> float:
        """How many tokens more a row is expected to get by drafting so many."""
        acceptance = self._rows[name].acceptance
        return acceptance.share * (acceptance.tokens(count) - 1)

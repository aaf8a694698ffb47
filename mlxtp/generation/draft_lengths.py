"""How many tokens each row of a batch drafts: rank 0 decides it. No MLX.

A pass is as wide as the longest draft of its rows, so rows decide together: those
draft, and so many tokens, that make most tokens a second of all. What a pass takes is
measured by the number of its rows and its width; what is accepted, by row.

What is measured stays for the server's life, so that a new request begins with what is
known. It is measured again now and then: passes without drafts while drafts pay, and
drafts while they do not.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from mlxtp.generation.pays import (
    FIRST,
    FIRST_PAUSE,
    FIRST_ROUNDS,
    LONGEST_PAUSE,
    MARGIN,
    MOST,
    MOST_ROUNDS,
    PLAIN_AGAIN,
    PLAIN_FIRST,
    PROVEN_ROUNDS,
    REMEMBERED,
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

# Trials may take this part of the time, and as long as so many passes at once. What one
# has taken beyond is made up for within the longest pause.
PART_OF_TRIALS, MOST_AT_ONCE = 0.02, 4
MOST_BEYOND = PART_OF_TRIALS * LONGEST_PAUSE

# While they do not pay, what they take is forgotten behind so many passes, then twice
# as many, up to the longest pause.
FIRST_PATIENCE = 64


@dataclass
class _RowDrafts:
    """What is known of the drafts of one row."""

    pause: int = FIRST_PAUSE  # passes for which it is left out next
    acceptance: Acceptance = field(default_factory=Acceptance)
    left_out_until: int = 0  # a number of passes
    rounds: int = 0  # in a row
    has_drafted: bool = False
    trial: int = TRIAL_ROUNDS  # of drafts, one of which has to be right in part


@dataclass
class _Passes:
    """What is known of passes of so many rows."""

    costs: Costs = field(default_factory=Costs)
    plain: int = 0  # passes without drafts, up to those that are measured first
    rounds: int = 0  # with drafts, since those without were measured
    most_rounds: int = FIRST_ROUNDS  # before those without are measured again
    widest: int = 0  # drafts that were measured
    measured: int = 0  # the number of the last pass with drafts that was
    patience: int = FIRST_PATIENCE


class DraftLengths:
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
        self._rows: dict[str, _RowDrafts] = {}
        self._of: dict[int, _Passes] = {}  # by the number of rows
        self._passes = 0
        self._token_seconds: deque[float] = deque(maxlen=REMEMBERED)  # of drafting one
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
        passes = self._of[len(room)]
        asked = {
            name: count
            for name, count in most.items()
            if self._may_draft(self._rows.setdefault(name, _RowDrafts()))
        }
        chosen = self._best(asked, len(room), costs)
        if asked and not chosen and self._forget(len(room)):
            chosen = self._best(asked, len(room), costs)
        if chosen and self._is_to_be_compared(passes):
            return {}
        for name in asked:
            row = self._rows[name]
            if name not in chosen:
                self._leave_out(row)
                continue
            row.rounds += 1
            if row.rounds == PROVEN_ROUNDS:
                row.pause, passes.patience = FIRST_PAUSE, FIRST_PATIENCE
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
            draft_seconds: what drafting took of the time, if that is known.
            is_alone: no prompt was read beside it.
        """
        if rows == 0:
            self._before, self._was_asked, self._was_drafted = 0, False, False
            return
        count = sum(count for count, _ in drafted.values())
        # The first draft of a row reads its prompt, and one behind a part of another
        # prompt waits for it.
        is_usual = self._before > 0 and not any(map(self._is_first, drafted))
        if count and is_usual and seconds is not None:
            self._token_seconds.append(draft_seconds / count)
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
            passes = self._of.setdefault(rows, _Passes())
            passes.plain = min(passes.plain + 1, PLAIN_FIRST)
        self._before = rows if is_alone else 0
        self._was_asked, self._was_drafted = bool(drafted), width > 0

    def _may_draft(self, row: _RowDrafts) -> bool:
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
        beyond = max(self._left, -MOST_BEYOND * plain)
        self._left = min(beyond, MOST_AT_ONCE * plain)

    def _measure(
        self, rows: int, width: int, seconds: float, *, is_asked: bool
    ) -> None:
        """Note what a pass took behind another one of as many rows.

        A pass without drafts is waited for in the next one.
        """
        passes = self._of.setdefault(rows, _Passes())
        costs = passes.costs
        plain = costs.plain_seconds
        if width:
            drafted = width - 1
            passes.widest = max(passes.widest, drafted)
            passes.measured = self._passes
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
        if rows not in self._of or self._of[rows].plain < PLAIN_FIRST:
            return None
        known = [n for n, x in self._of.items() if x.costs.plain_seconds is not None]
        nearest = min(known, key=lambda n: abs(n - rows), default=None)
        return None if nearest is None else self._of[nearest].costs

    def _forget(self, rows: int) -> bool:
        """Forget what drafts took that have not paid for long; whether it is so.

        One bad measure would condemn them for ever, or a time when contexts were long.
        """
        known = self._with_drafts(rows)
        since = 0 if known is None else self._passes - known.measured
        if known is None or self._left < 0 or since < known.patience:
            return False
        known.patience = min(2 * known.patience, LONGEST_PAUSE)
        self._token_seconds.clear()
        for other in self._of.values():
            if self._passes - other.measured >= since:
                other.costs.forget_drafts()
                other.widest = 0
        return True

    def _with_drafts(self, rows: int) -> _Passes | None:
        """Measured passes with drafts: of so many rows, else of the next fewer."""
        known = [n for n, x in self._of.items() if n <= rows and x.costs.knows_drafts]
        return self._of[max(known)] if known else None

    def _is_to_be_compared(self, passes: _Passes) -> bool:
        """Whether the next passes are to go without drafts, to be measured again."""
        passes.rounds += 1
        if passes.rounds <= passes.most_rounds:
            return False
        passes.rounds = 0
        passes.most_rounds = min(2 * passes.most_rounds, MOST_ROUNDS)
        passes.plain = PLAIN_FIRST - PLAIN_AGAIN
        passes.costs.renew_plain()
        return True

    def _judge(self, row: _RowDrafts, count: int, accepted: int) -> None:
        """Note what became of a row's draft."""
        row.acceptance.add(count, accepted)
        row.has_drafted = row.has_drafted or count > 0
        if accepted:
            row.trial = 0
        elif count and row.trial:
            row.trial -= 1
            if row.trial == 0 and self._fixed is None:
                self._leave_out(row)

    def _leave_out(self, row: _RowDrafts) -> None:
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
        token = median(self._token_seconds) if self._token_seconds else 0.0
        shares = {name: self._rows[name].acceptance.share for name in asked}
        expected = {
            name: self._rows[name].acceptance.expected(n) for name, n in asked.items()
        }
        best: dict[str, int] = {}
        best_rate = MARGIN * rows / plain
        widest = max(FIRST, 2 * self._of[rows].widest)
        for count in COUNTS:
            if count > widest:  # step by step, by what was measured
                break
            counts = {name: min(count, most) for name, most in asked.items()}
            if count > max(counts.values(), default=0):
                break
            wide = self._wide_seconds(count, rows, costs, plain)
            gains = sorted(
                (shares[name] * (expected[name][n] - 1), name)
                for name, n in counts.items()
            )
            tokens, drafting, none = float(rows), 0.0, 1.0
            names = []
            for gain, name in reversed(gains):
                share = shares[name]
                tokens += gain
                none *= 1 - share
                drafting += share * counts[name] * token
                names.append(name)
                rate = tokens / (none * alone + (1 - none) * wide + drafting)
                if rate > best_rate:
                    best_rate = rate
                    best = {name: counts[name] for name in names}
        return best

    def _wide_seconds(self, count: int, rows: int, costs: Costs, plain: float) -> float:
        """Seconds of a pass with so many drafted tokens a row.

        Before that is measured it is at least so many times a pass without drafts as
        for fewer rows.
        """
        known = self._with_drafts(rows)
        if known is None or known is self._of[rows]:
            return costs.seconds(count) or plain
        wide, one = known.costs.seconds(count), known.costs.plain_seconds
        return plain * wide / one if wide and one else plain

"""How many drafted tokens pay: from measured seconds and late acceptance. No MLX."""

from collections import deque
from collections.abc import Sequence
from math import ceil
from statistics import median

# The most tokens that are drafted for one pass.
MOST = 16
# What is drafted before it is known what it costs, and when nothing seems to pay.
FIRST, AGAIN = 4, 2
# Passes that are measured without drafts before the first draft. The time of the first
# of them does not count.
PLAIN_FIRST = 4
# Drafts have to be quicker than none by so much: measured times vary.
MARGIN = 1.1
# So many rounds with drafts are a trial, or fewer, once they have cost so many passes.
# Where it does not pay they are left out for so many passes, then for twice as many,
# and so on; and for so long that what the trial has cost is this part of them.
TRIAL_ROUNDS, MOST_LOST = 3, 3.0
FIRST_PAUSE, LONGEST_PAUSE = 16, 1024
LOSS = 0.02
# Drafts that have paid in so many rounds in a row begin with the first pause again.
PROVEN_ROUNDS = 16
# While drafts pay, so many passes in a row are made without them now and then, all but
# the first of which are measured: behind so many rounds, then twice as many, and so on.
# What was measured first may be slow: kernels and memory are new.
PLAIN_AGAIN = 3
FIRST_ROUNDS, MOST_ROUNDS = 16, 256
# Of so many times the median is taken.
REMEMBERED = 7
# What each round leaves of what was accepted before it.
FADING = 0.95
# And what is left of it when drafts are left out: the next trial is of another text.
FADING_OF_TRIALS = 0.3
# A guess of the acceptance of a drafted token, which counts as so many of them.
GUESS, GUESS_WEIGHT = 0.7, 1.0
# And that in a round anything is drafted, which counts as so many rounds.
SHARE_WEIGHT = 0.2


class Costs:
    """Seconds of rounds: of passes with drafts, and of those without.

    A round drafts, makes a pass, and draws its tokens. One rank's clock measures them.
    What other ranks decide with has to be the same: `to_floats` and
    `from_floats` hand it on.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=REMEMBERED)
        self._rounds: dict[int, deque[float]] = {}
        # Their medians.
        self._plain_seconds: float | None = None
        self._seconds: dict[int, float] = {}

    def add_plain(self, seconds: float) -> None:
        """Note what a pass took while drafts are left out."""
        self._plain.append(seconds)
        self._plain_seconds = median(self._plain)

    def add(self, drafted: int, seconds: float) -> None:
        """Note what a round took for which so many tokens were drafted; 0 are some."""
        times = self._rounds.setdefault(drafted, deque(maxlen=REMEMBERED))
        times.append(seconds)
        self._seconds[drafted] = median(times)

    def renew_plain(self) -> None:
        """Let what is measured next without drafts count more than what was before."""
        while len(self._plain) > 1:
            self._plain.popleft()

    def forget_drafts(self) -> None:
        """Forget what rounds with drafts took."""
        self._rounds.clear()
        self._seconds.clear()

    @property
    def plain_seconds(self) -> float | None:
        """Seconds of a pass while drafts are left out; None before the first."""
        return self._plain_seconds

    @property
    def knows_drafts(self) -> bool:
        """Whether a round was measured for which tokens were drafted."""
        return any(self._rounds)

    def seconds(self, drafted: int) -> float | None:
        """Seconds of a round with so many drafted tokens; None if nothing is known.

        What was not measured lies on the line between its neighbours, or through the
        first and the last that were.
        """
        known = dict(self._seconds)
        plain = self.plain_seconds
        if plain is not None:
            known.setdefault(0, plain)
        if not known:
            return None
        if drafted in known:
            return known[drafted]
        below = max((n for n in known if n < drafted), default=None)
        above = min((n for n in known if n > drafted), default=None)
        if below is None or above is None:
            below, above = min(known), max(known)
        if below == above:
            return known[below]
        slope = max(0.0, (known[above] - known[below]) / (above - below))
        return known[below] + slope * (drafted - below)

    def to_floats(self) -> list[float]:
        """What is known, as MOST + 2 numbers; 0 for what is not."""
        rounds = [self._seconds.get(n, 0.0) for n in range(MOST + 1)]
        return [self.plain_seconds or 0.0, *rounds]

    @classmethod
    def from_floats(cls, numbers: Sequence[float]) -> "Costs":
        """Make costs of what `to_floats` gave."""
        costs = cls()
        plain, *rounds = numbers
        if plain:
            costs.add_plain(plain)
        for drafted, seconds in enumerate(rounds):
            if seconds:
                costs.add(drafted, seconds)
        return costs


class Acceptance:
    """How many drafted tokens of one sequence were accepted lately."""

    def __init__(self) -> None:
        # For each place of a draft: how often it was judged, and how often accepted.
        self._judged, self._accepted = [0.0] * MOST, [0.0] * MOST
        self._rounds = self._with_draft = 0.0

    def add(self, drafted: int, accepted: int) -> None:
        """Note that `accepted` of `drafted` tokens were; none may have been drafted."""
        self._rounds = FADING * self._rounds + 1
        self._with_draft = FADING * self._with_draft + bool(drafted)
        if not drafted:
            return
        self.fade(FADING)
        for place in range(min(drafted, accepted + 1, MOST)):
            self._judged[place] += 1
            self._accepted[place] += place < accepted

    def fade(self, part: float) -> None:
        """Let what was accepted so far count for a part only."""
        self._judged = [part * x for x in self._judged]
        self._accepted = [part * x for x in self._accepted]

    @property
    def share(self) -> float:
        """In which share of the rounds anything was drafted."""
        return (self._with_draft + SHARE_WEIGHT) / (self._rounds + SHARE_WEIGHT)

    def tokens(self, drafted: int) -> float:
        """The expected tokens of a pass with so many drafted ones, its own among them.

        A place is judged by what is known of it and of the place before.
        """
        return self.expected(drafted)[-1]

    def expected(self, most: int) -> list[float]:
        """What `tokens` says of each number of drafted tokens from 0 to `most`."""
        rate, reached, tokens = GUESS, 1.0, [1.0]
        for place in range(most):
            weight = self._judged[place] + GUESS_WEIGHT
            rate = (self._accepted[place] + GUESS_WEIGHT * rate) / weight
            reached *= rate
            tokens.append(tokens[-1] + reached)
        return tokens


def best_count(acceptance: Acceptance, costs: Costs) -> int:
    """The number of drafted tokens, 0 to `MOST`, that makes most tokens a second."""
    plain = costs.plain_seconds
    if plain is None:
        return FIRST
    share = acceptance.share
    alone = costs.seconds(0) or plain
    best, best_rate = 0, MARGIN / plain
    for count in range(1, MOST + 1) if costs.knows_drafts else (FIRST,):
        with_draft = costs.seconds(count) or plain
        seconds = share * with_draft + (1 - share) * alone
        tokens = share * acceptance.tokens(count) + 1 - share
        if tokens / seconds > best_rate:
            best, best_rate = count, tokens / seconds
    return best


class DraftLength:
    """How many tokens to draft for each pass of one sequence.

    It says the same wherever it is told the same, `costs` included.

    Args:
        costs: shared by sequences whose passes cost the same.
        fixed: always so many; None for as many as pay.
    """

    def __init__(self, costs: Costs, fixed: int | None = None) -> None:
        self.costs = costs
        self.acceptance = Acceptance()
        self._fixed = fixed
        self._plain_left = 0 if costs.plain_seconds else PLAIN_FIRST
        self._pause = FIRST_PAUSE
        self._trial = TRIAL_ROUNDS  # rounds that are left of it
        self._lost = 0.0  # plain passes that it has cost
        self._proven = 0
        self._rounds = 0  # since passes without drafts were measured
        self._most_rounds = FIRST_ROUNDS

    @property
    def plain_passes(self) -> int:
        """How many passes to make without drafts from now on, before the next one."""
        return self._plain_left if self._fixed is None else 0

    @property
    def is_on_trial(self) -> bool:
        """Whether the next round with drafts is one of a trial."""
        return self._fixed is None and self._trial > 0

    @property
    def count(self) -> int:
        """How many tokens to draft for the next pass; 0 while they are left out."""
        if self._fixed is not None:
            return self._fixed
        if self._plain_left:
            return 0
        return best_count(self.acceptance, self.costs) or AGAIN

    def passed(self, passes: int) -> None:
        """Note that so many passes were made while drafts were left out."""
        self._plain_left = max(0, self._plain_left - passes)

    def judged(self, drafted: int, accepted: int, seconds: float | None = None) -> None:
        """Note what became of the drafts of a round; none may have been drafted.

        `seconds` are those of this very round; None counts what such rounds take.
        """
        self.acceptance.add(drafted, accepted)
        plain = self.costs.plain_seconds
        if plain:
            took = seconds or self.costs.seconds(drafted) or plain
            self._lost = max(0.0, self._lost + took / plain - (accepted + 1))
        self._trial = max(0, self._trial - 1) if self._lost < MOST_LOST else 0
        if self._fixed is not None or self._trial:
            return
        if best_count(self.acceptance, self.costs):
            self._go_on()
        else:
            self._leave_out()

    def _go_on(self) -> None:
        """Draft further, but for a few passes now and then that are measured."""
        self._proven += 1
        if self._proven >= PROVEN_ROUNDS:
            self._pause = FIRST_PAUSE
        self._rounds += 1
        if self._rounds == self._most_rounds:
            self._rounds, self._plain_left = 0, PLAIN_AGAIN
            self._most_rounds = min(2 * self._most_rounds, MOST_ROUNDS)

    def _leave_out(self) -> None:
        """Leave drafts out for a while."""
        self.acceptance.fade(FADING_OF_TRIALS)
        pause = max(self._pause, ceil(self._lost / LOSS))
        self._plain_left = min(pause, LONGEST_PAUSE)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._trial, self._lost = TRIAL_ROUNDS, 0.0
        self._proven = self._rounds = 0

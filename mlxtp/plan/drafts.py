"""What drafts bring: modelled, from how many of their tokens the model accepts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlxtp.plan import timing
from mlxtp.plan.model import PlannedModel
from mlxtp.plan.planning import Plan

# Of ten drafted tokens seven are accepted, each if those before it are. Assumed: text
# and models decide.
ACCEPTANCE = 0.7
# More tokens are not drafted in a round.
MOST_TOKENS = 16
TOKEN_BYTES = 4

# A way to draft: its name, the seconds of drafting 1, 2, 3, … tokens, the bytes that
# each rank needs for it.
_Way = tuple[str, list[float], tuple[int, ...]]


@dataclass(frozen=True)
class Draft:
    """A way to draft, with the number of tokens that pays most: modelled.

    `where` is a value of `--draft`, or "ngram" for drafts without a model. In a round
    `tokens` tokens are drafted, which takes `drafting_seconds`, and the model makes one
    pass; with 0 tokens drafting does not pay. `bytes_of_ranks` is what it needs on each
    rank. `fits` is None where a limit is not known.
    """

    where: str
    tokens: int
    tokens_per_second: float
    round_seconds: float
    drafting_seconds: float
    bytes_of_ranks: tuple[int, ...]
    fits: bool | None

    @property
    def rank(self) -> int | None:
        """The rank that drafts, where it is one."""
        if self.where != "one":
            return None
        return self.bytes_of_ranks.index(max(self.bytes_of_ranks))

    @property
    def options(self) -> str:
        """The options that draft so."""
        if self.where == "ngram":
            return "--draft-model ngram"
        return f"--draft-rank {self.rank}" if self.rank else f"--draft {self.where}"


def accepted(tokens: int, acceptance: float) -> float:
    """Return how many tokens a round is expected to give, the model's own included.

    Each of `tokens` drafted tokens is accepted with the probability `acceptance` if
    those before it are: 1 + a + a² + …
    """
    return sum(acceptance**position for position in range(tokens + 1))


def drafts(plan: Plan, model: PlannedModel | None, acceptance: float) -> list[Draft]:
    """Return all ways to draft, the fastest of those that fit first.

    Args:
        plan: that of the model which the draft is for.
        model: the draft model; None drafts by n-grams, which takes no time.
        acceptance: as in `accepted`.

    Raises: ValueError if the draft model cannot be built.
    """
    passes = [plan.decode_pass(n + 1).seconds for n in range(MOST_TOKENS + 1)]
    ways = _ways(plan, model) if model else [_ngram(len(plan.needs))]
    return sorted(
        (_best(plan, way, passes, acceptance) for way in ways),
        key=lambda d: (d.fits is False, -d.tokens_per_second),
    )


def _best(plan: Plan, way: _Way, passes: Sequence[float], acceptance: float) -> Draft:
    """A way with the number of tokens that gives the most tokens a second."""
    where, drafting, needed = way
    left = plan.left_bytes
    spare = {machine.host: 0 for machine in plan.setting.machines}
    for machine, nbytes in zip(plan.setting.machines, needed, strict=True):
        spare[machine.host] += nbytes
    room = [
        None if rest is None else rest >= spare[machine.host]
        for rest, machine in zip(left, plan.setting.machines, strict=True)
    ]
    fits = False if False in room else None if None in room else True
    rounds = [passes[0]] + [
        seconds + passes[n] for n, seconds in enumerate(drafting, start=1)
    ]
    rates = [
        plan.setting.batch * accepted(n, acceptance) / seconds
        for n, seconds in enumerate(rounds)
    ]
    best = rates.index(max(rates))
    seconds = drafting[best - 1] if best else 0.0
    return Draft(where, best, rates[best], rounds[best], seconds, needed, fits)


def _ngram(ranks: int) -> _Way:
    return "ngram", [0.0] * MOST_TOKENS, (0,) * ranks


def _ways(plan: Plan, model: PlannedModel) -> Iterator[_Way]:
    """Whole on the rank with the most memory left, whole on all, and split."""
    setting, ranks = plan.setting, range(len(plan.needs))
    machines, network = setting.machines, setting.network
    [whole] = setting.needs(model, [1])
    alone = [timing.decode_on_one(whole, machine) for machine in machines]

    def drafting(rank: int, tokens: int) -> float:
        # All tokens of a round are evaluated together.
        waits = (tokens - 1) * alone[rank].crossings
        return tokens * alone[rank].seconds - waits

    left = [float("inf") if rest is None else rest for rest in plan.left_bytes]
    best = max(ranks, key=lambda r: (left[r], machines[r].bytes_per_second, -r))
    counts = range(1, MOST_TOKENS + 1)
    told = [network.bcast_seconds(n * setting.batch * TOKEN_BYTES) for n in counts]
    yield (
        "one",
        [drafting(best, n) + told[n - 1] for n in counts],
        tuple(whole.bytes if rank == best else 0 for rank in ranks),
    )
    if len(ranks) == 1:
        return
    # Where machines differ, so may the tokens that they draft.
    if len({machine.chip for machine in machines}) == 1:
        slowest = [max(drafting(rank, n) for rank in ranks) for n in counts]
        yield "all", slowest, (whole.bytes,) * len(ranks)
    try:
        split = setting.needs(model, [1] * len(ranks))
    except ValueError:  # fewer heads than ranks
        return
    token = timing.decode(split, machines, network).seconds
    yield "split", [n * token for n in counts], tuple(need.bytes for need in split)

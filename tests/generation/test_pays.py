"""How many drafted tokens pay, by a model of what rounds cost and what is accepted."""

import random
from collections.abc import Callable

import pytest

from mlxtp.generation.pays import (
    LONGEST_PAUSE,
    MOST,
    Acceptance,
    Costs,
    DraftLength,
    best_count,
)

pytestmark = pytest.mark.once

Seconds = Callable[[int], float]


def run(
    rate: float, seconds: Seconds, tokens: int, pays: DraftLength | None = None
) -> tuple[float, list[int]]:
    """Make tokens: how long that takes, beside none, and what was drafted each time.

    A drafted token is accepted with the probability `rate`; `seconds` are those of a
    round with so many drafted tokens. The first behind passes without takes one more:
    the drafter reads what it has not.
    """
    rng = random.Random(0)
    pays = DraftLength(Costs()) if pays is None else pays
    spent, made, counts, is_warm = 0.0, 0, [], False
    while made < tokens:
        count = pays.count
        counts.append(count)
        took = seconds(count) + (seconds(0) if count and not is_warm else 0)
        spent += took
        accepted = 0
        while accepted < count and rng.random() < rate:
            accepted += 1
        made += accepted + 1
        if count:
            if is_warm:
                pays.costs.add(count, took)
            pays.judged(count, accepted, took if pays.is_on_trial else None)
        else:
            pays.costs.add_plain(seconds(0))
            pays.passed(1)
        is_warm = count > 0
    return spent / (made * seconds(0)), counts


def on_cables(count: int) -> float:
    return 0.1 + 0.002 * count


def on_a_slow_machine(count: int) -> float:
    return 0.002 * (count + 1)


def test_good_drafts_on_cables_are_long() -> None:
    time, counts = run(0.95, on_cables, 400)
    assert time < 1 / 4
    assert sum(counts[-20:]) / 20 > 8


def test_bad_drafts_are_left_out() -> None:
    for rate in (0.0, 0.1):
        time, counts = run(rate, on_a_slow_machine, 2000)
        assert time < 1.05
        assert counts[-500:].count(0) > 480


@pytest.mark.parametrize("times", [1.5, 2, 3, 4])
def test_dear_trials_are_rare(times: float) -> None:
    """As where more ranks than cores wait for each other in a round."""
    for tokens in (200, 1000):
        time, counts = run(0.0, lambda count: times if count else 1.0, tokens)
        assert time < 1.05
    assert sum(map(bool, counts)) >= 4  # tried again at least once


def test_one_slow_round_does_not_leave_drafts_out_for_ever() -> None:
    pays = DraftLength(Costs())
    pays.costs.add_plain(0.1)
    for _ in range(3):
        if pays.count:
            pays.judged(pays.count, 0, 1000.0)
    assert 0 < pays.plain_passes <= LONGEST_PAUSE


def test_what_passes_without_drafts_take_is_measured_again() -> None:
    """What was measured first may have been slow, and drafts seemed to pay."""
    pays = DraftLength(Costs())
    pays.costs.add_plain(2.0)
    time, counts = run(0.5, lambda count: 1.0 + 0.5 * count, 400, pays)
    assert time < 1.1
    assert counts[-100:].count(0) > 80


def test_they_are_tried_again() -> None:
    """A text that begins to repeat itself is noticed."""
    pays = DraftLength(Costs())
    run(0.0, on_cables, 300, pays)
    time, counts = run(1.0, on_cables, 600, pays)
    assert counts[0] == 0 and counts[-1] == MOST
    assert time < 1 / 2


def test_as_many_as_pay() -> None:
    """The best number by what is known in full."""

    def rate(count: int) -> float:
        tokens = sum(0.6**k for k in range(count + 1))
        return tokens / seconds(count)

    def seconds(count: int) -> float:
        return 0.02 + 0.004 * count

    costs, acceptance = Costs(), Acceptance()
    costs.add_plain(seconds(0))
    for count in (1, 4, 9):
        costs.add(count, seconds(count))
    for tenth in range(400):
        accepted = 0
        while accepted < 9 and (tenth * 37 + accepted * 11) % 10 < 6:
            accepted += 1
        acceptance.add(9, accepted)
    best = max(range(MOST + 1), key=rate)
    assert abs(best_count(acceptance, costs) - best) <= 1


def test_what_is_not_known_lies_on_a_line() -> None:
    costs = Costs()
    assert costs.seconds(3) is None
    costs.add_plain(1.0)
    assert costs.seconds(3) == 1.0
    costs.add(4, 3.0)
    assert costs.seconds(2) == 2.0 and costs.seconds(8) == 5.0
    told = Costs.from_floats(costs.to_floats())
    assert [told.seconds(n) for n in range(9)] == [costs.seconds(n) for n in range(9)]


def test_a_fixed_number_stays() -> None:
    _, counts = run(0.0, on_a_slow_machine, 50, DraftLength(Costs(), fixed=3))
    assert set(counts) == {3}

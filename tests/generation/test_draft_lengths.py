"""How many tokens rows draft: what pays, by passes that take a known time. No MLX."""

import random
from collections.abc import Callable, Mapping

import pytest

from mlxtp.generation.draft_lengths import PLACES, DraftLengths
from mlxtp.generation.pays import MOST

pytestmark = pytest.mark.once

# Seconds of a pass, of so many rows and so many tokens a row.
PassSeconds = Callable[[int, int], float]


class Clock:
    """Makes passes for rows whose drafted tokens are right by chance.

    A pass without drafts is waited for in the next one.
    """

    def __init__(
        self, drafts: DraftLengths, seconds: PassSeconds, draft_seconds: float = 0.0
    ) -> None:
        self.drafts, self._seconds = drafts, seconds
        self._draft_seconds = draft_seconds
        self._draw = random.Random(0)
        self._on_its_way = 0.0
        self.asked: list[dict[str, int]] = []

    def run(self, rows: Mapping[str, float], tokens: int) -> float:
        """Make passes until each row has so many tokens; tokens a second of all.

        `rows` are how likely a drafted token of each is right.
        """
        total, got = 0.0, dict.fromkeys(rows, 0)
        while got:
            room = {name: min(MOST, tokens - count) for name, count in got.items()}
            asked = self.drafts.choose(room)
            self.asked.append(asked)
            passed, drafting, drafted = self._on_its_way, 0.0, {}
            width = 1 + max(asked.values()) if asked else 0
            for name in got:
                count = accepted = asked.get(name, 0)
                for place in range(count):
                    if self._draw.random() >= rows[name]:
                        accepted = place
                        break
                got[name] += 1 + accepted
                if count:
                    drafted[name] = count, accepted
                    drafting += count * self._draft_seconds
            self._on_its_way = 0.0 if asked else self._seconds(len(got), 1)
            passed += drafting + (self._seconds(len(got), width) if asked else 0.0)
            self.drafts.passed(
                passed, len(got), width, drafted, drafting, is_alone=True
            )
            total += passed
            got = {name: count for name, count in got.items() if count < tokens}
        return len(rows) * tokens / total

    @property
    def late(self) -> float:
        """How many tokens a row drafts in a pass, at the end."""
        last = self.asked[-40:-8]
        return sum(sum(x.values()) for x in last) / max(1, sum(map(len, last)))


def rows(count: int, rate: float) -> dict[str, float]:
    return {f"row {number}": rate for number in range(count)}


def cables(rows: int, width: int) -> float:
    """Waits, and a little for each token."""
    return 0.1 + 0.001 * rows * width


def arithmetic(rows: int, width: int) -> float:
    """Each token takes its time."""
    return 0.002 + 0.005 * rows * width


def test_where_a_pass_of_several_tokens_takes_as_long_as_one() -> None:
    for count in (1, 8):
        clock = Clock(DraftLengths(), cables)
        speed = clock.run(rows(count, 0.85), 400)
        assert speed > (2.5 if count == 8 else 4) * count / cables(count, 1)
        assert clock.late >= 6


def test_where_drafts_do_not_pay() -> None:
    """They are tried now and then, also by one request after another."""
    for seconds, rate in ((arithmetic, 0.6), (cables, 0.0), (arithmetic, 0.0)):
        clock = Clock(DraftLengths(), seconds)
        for number in range(8):
            speed = clock.run({f"request {number}": rate}, 128)
            assert number < 1 or speed > 0.95 / seconds(1, 1), (seconds, rate, number)


def test_drafts_that_take_long() -> None:
    """Few tokens of a draft model that is half as slow as a pass."""
    clock = Clock(DraftLengths(), cables, draft_seconds=0.05)
    clock.run(rows(1, 0.7), 300)
    assert clock.late < 3
    assert Clock(DraftLengths(), cables).run(rows(1, 0.7), 300) > 0


def test_many_rows_draft_less() -> None:
    """Where their tokens take as long as the waits."""

    def both(rows: int, width: int) -> float:
        return 0.1 + 0.004 * rows * width

    late = []
    for count in (1, 8, 32):
        clock = Clock(DraftLengths(places=1024), both)
        speed = clock.run(rows(count, 0.7), 400)
        assert speed > 0.95 * count / both(count, 1)
        late.append(clock.late)
    assert late[0] > 2 * late[1] and late[1] > late[2]


def test_each_row_by_its_own_acceptance() -> None:
    clock = Clock(DraftLengths(), cables, draft_seconds=0.005)
    clock.run({"good": 0.9, "bad": 0.0}, 300)
    both = clock.asked[: len(clock.asked) // 2]
    drafting = {name: sum(name in asked for asked in both) for name in ("good", "bad")}
    assert drafting["good"] > 4 * drafting["bad"] > 0


def test_it_is_taken_up_again_where_the_text_changes() -> None:
    drafts = DraftLengths()
    clock = Clock(drafts, cables)
    clock.run({"prose": 0.0}, 100)
    assert clock.run({"code": 0.9}, 300) > 2 / cables(1, 1)


def test_limits() -> None:
    fixed = DraftLengths(5)
    assert fixed.choose({"a": 3, "b": 9, "c": 0}) == {"a": 3, "b": 5}
    many = DraftLengths(16).choose(dict.fromkeys(map(str, range(32)), 16))
    assert len(many) * (1 + max(many.values())) <= PLACES
    alone = DraftLengths(5, in_batches=False)
    assert alone.choose({"a": 9, "b": 9}) == {} and alone.choose({"a": 9}) == {"a": 5}
    assert DraftLengths(4).choose({}) == {}


def test_counted_are_all_rows() -> None:
    drafts = DraftLengths(4)
    drafts.choose({"a": 4, "b": 4})
    told = {"a": (4, 1), "b": (0, 0)}
    drafts.passed(0.1, 2, 5, told, 0.0, is_alone=True)
    assert (drafts.rounds, drafts.drafted, drafts.accepted) == (1, 4, 1)


def test_one_bad_measure_does_not_condemn_drafts() -> None:
    """The first pass of several tokens takes long once: its memory is new."""
    wide = 0

    def first_is_slow(rows: int, width: int) -> float:
        nonlocal wide
        wide += width > 1
        return 0.6 if width > 1 and wide <= 2 else cables(rows, width)

    clock = Clock(DraftLengths(), first_is_slow)
    speeds = [clock.run({f"request {n}": 0.85}, 200) for n in range(8)]
    assert max(speeds[-2:]) > 2.5 / cables(1, 1), speeds


def test_drafts_are_taken_up_where_passes_become_cheap() -> None:
    clock = Clock(DraftLengths(), lambda *x: seconds(*x))
    seconds = arithmetic
    clock.run(rows(1, 0.85), 300)
    seconds = cables
    speeds = [clock.run({f"request {n}": 0.85}, 200) for n in range(10)]
    assert max(speeds[-2:]) > 2.5 / cables(1, 1), speeds


def test_passes_without_drafts_are_measured_again() -> None:
    """The first ones are slow, so that drafts seem to pay which do not."""
    plain = 0

    def first_are_slow(rows: int, width: int) -> float:
        nonlocal plain
        plain += width == 1
        if width > 1:
            return 0.6
        return 0.8 if plain <= 6 else 0.1

    clock = Clock(DraftLengths(), first_are_slow)
    clock.run({"first": 0.8}, 200)
    assert sum(map(bool, clock.asked)) > 8
    assert clock.run({"again": 0.8}, 128) > 0.95 / 0.1


def test_more_rows_begin_with_what_is_known_of_fewer() -> None:
    clock = Clock(DraftLengths(), arithmetic)
    clock.run(rows(1, 0.6), 40)
    assert any(clock.asked)
    clock.asked.clear()
    clock.run(rows(8, 0.6), 16)
    assert not any(clock.asked)


def test_drafts_behind_the_reading_of_prompts_are_not_timed() -> None:
    """They wait for what was read: other rows read prompts while two decode."""
    drafts = DraftLengths()
    room = {"a": 16, "b": 16}
    rounds = 0
    for number in range(40):
        asked = drafts.choose(room)
        rounds += bool(asked)
        told = {name: (count, count) for name, count in asked.items()}
        width = 1 + max(asked.values()) if asked else 0
        reads = number > 8 and number % 2 == 0
        # Reading takes as long as many passes, and the next draft waits for it.
        drafting = 0.002 if number <= 8 or reads else 2.0
        drafts.passed(0.1 + drafting, 2, width, told, drafting, is_alone=not reads)
    assert rounds > 28


def test_drafts_beside_drafters_that_read_are_not_timed() -> None:
    drafts, rounds = DraftLengths(), 0
    for number in range(40):
        asked = drafts.choose({"a": 16, "b": 16})
        rounds += bool(asked)
        told = {name: (count, count) for name, count in asked.items()}
        width = 1 + max(asked.values()) if asked else 0
        seconds, drafting = (0.1, 0.002) if number < 9 else (None, 2.0)
        drafts.passed(seconds, 2, width, told, drafting, is_alone=True)
    assert rounds > 28


def test_passes_of_no_rows_say_nothing() -> None:
    drafts = DraftLengths()
    for _ in range(8):
        assert drafts.choose({}) == {}
        drafts.passed(1e-5, 0, 0, {}, 0.0, is_alone=True)
    for _ in range(8):  # beside prompts, so that nothing is known of one row
        assert drafts.choose({"a": 16}) == {}
        drafts.passed(0.1, 1, 0, {}, 0.0, is_alone=False)


def test_a_first_draft_behind_a_long_prompt_is_not_timed() -> None:
    """What drafts reads the prompt of a row beside others; they go on."""
    drafts, rounds = DraftLengths(), 0
    for _ in range(50):
        asked = drafts.choose(dict.fromkeys("abc", 16))
        told = {name: (count, count) for name, count in asked.items()}
        drafting = 0.002 if rounds else 5.0
        rounds += bool(asked)
        width = 1 + max(asked.values()) if asked else 0
        drafts.passed(0.1 + drafting, 3, width, told, drafting, is_alone=True)
    assert rounds > 35

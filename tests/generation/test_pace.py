"""How much of prompts is read beside rows, with passes whose times are computed."""

from dataclasses import dataclass, field

import pytest

from mlxtp.generation.pace import (
    FIRST_PART,
    LEAST_PART,
    PART_OF_PASS,
    PAUSE_SECONDS,
    Pace,
)

pytestmark = pytest.mark.once

DECODE, TOKEN = 0.010, 0.001  # seconds: of a pass that decodes, of a token that is read


@dataclass
class Machine:
    """Computes one thing after the other, and waits for what the engine waits for."""

    pace: Pace = field(default_factory=Pace)
    now: float = 0.0
    besides: float = 0.0  # seconds that a part takes besides its tokens
    free: float = 0.0  # when all that was begun is computed
    drawn: float = 0.0  # when the tokens of the last pass are
    read: float = 0.0  # when what was read last is; 0 if it was not read in that pass
    drafts: bool = False  # a pass waits for its own tokens

    def pass_(self, read: int, rows: int, prompts: int = 1, token: float = TOKEN):
        """Make a pass; return how long it was from the last one."""
        begun = self.now
        self.pace.begin(read, rows, prompts)
        drawn = self.drawn
        self.drawn = 0.0
        if rows:
            self.free = self.drawn = max(self.free, self.now) + DECODE
            self.now = max(self.now, self.drawn if self.drafts else drawn)
        before, self.read = self.read, 0.0
        if read:
            self.now = max(self.now, before)
            self.free = max(self.free, self.now) + self.besides + read * token
            self.read = self.free
        self.pace.passed(self.now - begun, is_waited_for=self.drafts and rows > 0)
        return self.now - begun


def decoding(machine: Machine, passes: int = 40, rows: int = 4) -> None:
    for _ in range(passes):
        machine.pass_(0, rows)


def reading(machine: Machine, passes: int, most: int = 512, **more) -> list[int]:
    parts = []
    for _ in range(passes):
        parts.append(machine.pace.part(most))
        machine.pass_(parts[-1], 4, **more)
    return parts


def test_before_a_measure_a_part_is_short() -> None:
    machine = Machine()
    decoding(machine)
    assert machine.pace.part(512) == FIRST_PART
    assert machine.pace.part(8) == 8
    assert machine.pace.decode_seconds == pytest.approx(DECODE)


def test_a_prompt_is_read_for_a_second_and_then_a_part_in_each_pass() -> None:
    machine = Machine()
    decoding(machine)
    parts = reading(machine, 60, most=4096)
    assert parts[0] == FIRST_PART
    # At once what a second allows; none is four times as long as what was measured.
    assert all(parts[at] <= 4 * max(parts[:at]) for at in range(1, 10))
    first = sum(parts[:6]) * TOKEN
    assert first == pytest.approx(PAUSE_SECONDS, rel=0.1)
    assert parts[-1] == pytest.approx(PART_OF_PASS * DECODE / TOKEN, abs=1)
    assert machine.pace.decode_seconds == pytest.approx(DECODE)


def test_what_reading_may_take_at_once_comes_back_while_rows_decode() -> None:
    machine = Machine()
    decoding(machine)
    reading(machine, 60, most=4096)
    assert machine.pace.part(4096) < 20
    one_pass = PART_OF_PASS * DECODE / TOKEN
    decoding(machine, 10)
    assert machine.pace.part(4096) == pytest.approx(11 * one_pass, abs=10)
    decoding(machine, 1000)
    assert machine.pace.part(4096) == pytest.approx(PAUSE_SECONDS / TOKEN, rel=0.01)


def test_passes_with_drafts_are_measured_as_others() -> None:
    """They wait for what the pass before has read, in place of the one before that."""
    machine = Machine(drafts=True)
    decoding(machine)
    for _ in range(20):  # one part alone, behind passes that only decode
        machine.pass_(40, 4)
        decoding(machine, 3)
    assert machine.pace._all.token_seconds == pytest.approx(TOKEN, rel=0.01)
    assert machine.pace.decode_seconds == pytest.approx(DECODE)
    machine.drafts = False
    decoding(machine, 40)
    assert machine.pace.decode_seconds == pytest.approx(DECODE)


def test_where_nothing_decodes_reading_holds_up_nobody() -> None:
    machine = Machine()
    decoding(machine)
    reading(machine, 60, most=4096)
    machine.pass_(0, 0)
    assert machine.pace.part(4096) == pytest.approx(PAUSE_SECONDS / TOKEN, rel=0.01)


def test_a_prompt_that_is_read_alone_is_measured() -> None:
    """Its time is that of the pass behind the one in which its row joins."""
    machine = Machine()
    for _ in range(5):
        machine.pass_(512, 0)
    machine.pass_(63, 0)
    decoding(machine, 20, rows=1)
    assert machine.pace.part(4096) == pytest.approx(PAUSE_SECONDS / TOKEN, rel=0.05)
    assert machine.pace.decode_seconds == pytest.approx(DECODE)


def test_many_prompts_are_read_faster_than_few_rows_decode() -> None:
    machine = Machine()
    decoding(machine)
    reading(machine, 60, most=4096)
    one = reading(machine, 10, most=4096)[-1]
    three = reading(machine, 10, most=4096, prompts=12)[-1]
    assert three == pytest.approx(3 * one, abs=2)


def test_a_machine_that_gets_faster_reads_more() -> None:
    machine = Machine()
    decoding(machine)
    reading(machine, 60)
    parts = reading(machine, 30, token=TOKEN / 100)
    assert parts[0] < 20
    assert parts[-1] == 512


def test_parts_do_not_shrink_because_they_take_long_whatever_their_length() -> None:
    machine = Machine(besides=DECODE)
    decoding(machine)
    parts = reading(machine, 300, most=4096)
    long_token = TOKEN + DECODE / max(parts)
    assert parts[-1] == pytest.approx(LEAST_PART * DECODE / long_token, abs=1)

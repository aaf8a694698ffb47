"""What rank 0 decides: whom to admit, how much to read, who gives way."""

from dataclasses import replace

import pytest
from driven import GREEDY

from mlxtp.generation.capacity import CacheBytes, Capacity, Growth, RankCapacity
from mlxtp.generation.draft_lengths import DraftLengths
from mlxtp.generation.prefix_cache import PrefixIndex
from mlxtp.generation.scheduler import Scheduler
from mlxtp.generation.step import GenerationRequest, Step

pytestmark = pytest.mark.once


def scheduler(
    tokens: int = 10_000,
    prefix_tokens: int = 0,
    growths: tuple[Growth, ...] = (Growth(1.0),),
    **options: object,
) -> Scheduler:
    """One whose ranks have room for so many tokens: one, and one with half the room."""
    cache = CacheBytes(0, growths, 1 << 30)
    capacity = Capacity(
        (
            RankCapacity("a", cache, 2 * tokens),
            RankCapacity("b", cache, tokens),
        ),
        part=64,
    )
    index = PrefixIndex(capacity.bytes_of, prefix_tokens)
    return Scheduler(capacity, index, **{"part": 64, "concurrency": 8, **options})


def submit(
    to: Scheduler, name: str, length: int, first: int = 0, **settings: object
) -> None:
    prompt = tuple(range(first, first + length))
    to.submit(GenerationRequest(name, prompt, length, GREEDY, **settings))


def admitted(step: Step) -> list[str]:
    return [admission.request.id for admission in step.admit]


def run_until(to: Scheduler, name: str, *, most: int = 100) -> list[Step]:
    """Decide steps until one lets `name` decode; each row gets a token a pass."""
    steps: list[Step] = []
    rows: list[str] = []
    while not steps or name not in steps[-1].join:
        assert len(steps) < most
        steps.append(to.decide())
        rows = [row for row in rows if row not in steps[-1].drop]
        for row in rows:
            to.add(row, 7)
        rows += steps[-1].join
    return steps


def test_a_prompt_is_read_but_for_its_last_token() -> None:
    one = scheduler()
    submit(one, "a", 100)
    steps = run_until(one, "a")
    assert [step.read for step in steps] == [(("a", 64),), (("a", 35),), ()]
    assert admitted(steps[0]) == ["a"] and steps[2].join == ("a",)


def test_a_prompt_of_one_token_decodes_at_once() -> None:
    one = scheduler()
    submit(one, "a", 1)
    first = one.decide()
    assert admitted(first) == ["a"] and not first.read
    assert one.decide().join == ("a",)


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    """Nor does the long one for them: they take turns."""
    one = scheduler(tokens=100_000)
    submit(one, "long", 2000)
    one.decide()
    for number in range(6):
        submit(one, f"short {number}", 40, first=5000 + 100 * number)
    steps = run_until(one, "short 3", most=20)
    assert sum(n for step in steps for name, n in step.read if name == "long") >= 128


def test_in_the_order_of_arrival_as_room_is_left() -> None:
    one = scheduler(tokens=1600)
    for number, name in enumerate("abc"):
        submit(one, name, 500, first=1000 * number)
    submit(one, "small", 10, first=9000)
    # A prompt takes up to 255 tokens more than it has.
    assert admitted(one.decide()) == ["a", "b"]
    assert one.waiting == 2  # nobody overtakes
    one.end("a")
    assert admitted(one.decide()) == ["c"]


def test_the_youngest_gives_way_and_comes_first_again() -> None:
    one = scheduler(tokens=1500)
    submit(one, "old", 400)
    submit(one, "young", 400, first=1000)
    run_until(one, "young")
    steps = []
    while one.preemptions == 0:
        for name in ("old", "young"):
            one.add(name, 7)
        steps.append(one.decide())
        assert len(steps) < 600
    assert steps[-1].drop == ("young",) and one.waiting == 1
    submit(one, "third", 10, first=3000)
    one.end("old")
    again = one.decide()
    assert admitted(again)[0] == "young"
    request = again.admit[0].request
    assert request.prompt_length == 400
    assert len(request.tokens) == 400 + len(steps)


def test_rows_stay_as_long_as_one_that_has_gone() -> None:
    """For a pass: what has room without it waits for the next one."""
    # A window costs a prompt that is read more than a row.
    one = scheduler(tokens=3000, growths=(Growth(1.0), Growth(10.0, window=8)))
    submit(one, "old", 100)
    submit(one, "long", 1110, first=1000)
    run_until(one, "long")
    submit(one, "next", 600, first=5000)
    assert not one.decide().admit
    one.end("long")
    assert not one.decide().admit
    assert admitted(one.decide()) == ["next"]


def test_one_that_fills_the_context_is_admitted() -> None:
    """Behind its prompt nothing is drawn, so that nothing more needs room."""
    one = scheduler(tokens=1000)
    prompt = tuple(range(745))
    assert one.use == 0
    settings = replace(GREEDY, max_tokens=0)
    one.submit(GenerationRequest("a", prompt, len(prompt), settings))
    assert admitted(one.decide()) == ["a"]
    assert one.use == 1


def test_a_row_is_copied_before_the_rows_go() -> None:
    """What the prefix cache held gives way to that; one alone is not copied."""
    for names in ("ab", "a"):
        one = scheduler(tokens=3300, prefix_tokens=2100)
        submit(one, "old", 700, first=9000)
        run_until(one, "old")
        one.end("old")
        ((_, old),) = one.decide().keep
        for number, name in enumerate(names):
            submit(one, name, 800, first=2000 * number)
            run_until(one, name)
        one.end("a")
        step = one.decide()
        assert [name for name, _ in step.keep] == ["a"]
        assert list(step.forget) == [old] * (names == "ab")


def test_the_prefix_cache_gives_way_to_requests() -> None:
    one = scheduler(tokens=1500, prefix_tokens=1400)
    submit(one, "a", 900)
    run_until(one, "a")
    one.end("a")
    kept = one.decide().keep
    assert [name for name, _ in kept] == ["a"]
    submit(one, "same", 1000)
    step = one.decide()
    assert step.admit[0].cached == 900 and step.admit[0].key == kept[0][1]
    one.end("same")
    one.decide()
    submit(one, "other", 1000, first=5000)
    step = one.decide()
    assert admitted(step) == ["other"] and step.forget


def test_prompts_in_common_are_read_once() -> None:
    one = scheduler(prefix_tokens=10_000)
    for name in "abc":
        submit(one, name, 300)
    first = one.decide()
    assert admitted(first) == ["a"]
    steps = run_until(one, "a")
    assert steps[-1].keep and admitted(steps[-1]) == ["b", "c"]
    assert [admission.cached for admission in steps[-1].admit] == [299, 299]
    assert one.found_tokens == 2 * 299


def test_who_has_little_in_common_does_not_wait() -> None:
    """Nor who finds as much in the prefix cache."""
    one = scheduler(tokens=100_000, prefix_tokens=50_000)
    turn = (*range(100), *range(20_000, 22_000))
    one.submit(GenerationRequest("turn", turn, len(turn), GREEDY))
    run_until(one, "turn")
    one.end("turn")
    submit(one, "long", 9000)
    assert admitted(one.decide()) == ["long"]
    prompts = {
        "short": (*range(100), 7),
        "next turn": (*turn, 7, 7),
        "alike": (*range(8000), 7),
    }
    for name, prompt in prompts.items():
        one.submit(GenerationRequest(name, prompt, len(prompt), GREEDY))
    step = one.decide()
    assert admitted(step) == ["short", "next turn"]
    assert [admission.cached for admission in step.admit] == [100, 2100]


def test_caches_that_cannot_be_taken_back_are_kept_at_turns() -> None:
    one = scheduler(prefix_tokens=10_000, trimmable_below=0)
    submit(one, "a", 100, boundaries=(40, 90))
    steps = run_until(one, "a")
    assert [step.read for step in steps if step.read] == [
        (("a", 40),),
        (("a", 50),),
        (("a", 9),),
    ]
    assert [step.keep[0][0] for step in steps if step.keep] == ["a", "a"]
    one.end("a")
    one.decide()
    submit(one, "b", 95)
    assert one.decide().admit[0].cached == 90


def test_rows_draft_in_the_memory_that_is_left() -> None:
    """As many tokens as have room in all rows, which are filled up to the longest."""
    one = scheduler(tokens=2 * (305 + 255), draft_lengths=DraftLengths(16))
    submit(one, "short", 200)
    submit(one, "long", 300, first=1000)
    run_until(one, "long")
    one.add("long", 7)
    # 301 tokens, one that the pass gives, and drafts.
    assert dict(one.decide().draft) == {"long": 3}  # the other one has all it wants
    for _ in range(3):
        one.add("long", 7)
    assert one.decide().draft == ()
    assert one.preemptions == 0


def test_what_is_kept_is_what_caches_hold() -> None:
    """Behind a pass with drafts all but the last token; else all."""
    for width, held in ((0, 52), (4, 51)):
        one = scheduler(prefix_tokens=10_000)
        submit(one, "a", 50)
        run_until(one, "a")
        for _ in range(2):
            one.add("a", 7)
        one.passed(None, width)
        one.end("a")
        assert one.decide().keep
        submit(one, "b", 50)
        assert one._prefixes.find([*range(50), 7, 7, 7]).tokens == held


def test_no_draft_reaches_beyond_what_is_asked_for() -> None:
    one = scheduler(draft_lengths=DraftLengths(16), context=60)
    for name, most in (("a", 6), ("b", None)):
        settings = replace(GREEDY, max_tokens=most)
        prompt = tuple(range(50))
        one.submit(GenerationRequest(name, prompt, 50, settings))
    run_until(one, "b")
    # A token may be on its way, and a pass gives one besides its drafts.
    got = len(one._active["a"].tokens) - 50
    assert dict(one.decide().draft) == {"a": 6 - got - 2, "b": 8}

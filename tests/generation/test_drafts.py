"""What drafts: n-grams, and models that are whole on a rank, on all, or split."""

import copy
import random
import tracemalloc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from every_type import LONG
from hypothesis import given
from hypothesis import strategies as st
from saved_types import saved

import mlxtp
from mlxtp import Communicator
from mlxtp.generation.drafts import (
    FEW_TOKENS,
    ModelDrafts,
    NgramDrafter,
    drafts_of,
)
from mlxtp.layers.sums import are_outputs_unread

# Worlds of 2 and 5 add no case: what drafts is whole on a rank, or split like any.
pytestmark = pytest.mark.ranks(1, 3)

SIZES = (5, 4, 3, 2)


def followed(tokens: list[int], count: int) -> list[int]:
    """What came behind the latest of the longest matches, looked up one by one."""
    for size in SIZES:
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                copied = list(tokens)
                for _ in range(count):
                    copied.append(copied[place - len(tokens) + len(copied)])
                return copied[len(tokens) :]
    return []


@pytest.mark.once
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_ngrams_are_the_latest_of_the_longest(
    tokens: list[int], data: st.DataObject
) -> None:
    drafter, known = NgramDrafter(), 0
    while known < len(tokens):
        known = data.draw(st.integers(known + 1, len(tokens)))
        count = data.draw(st.integers(1, 6))
        assert drafter.propose(tokens[:known], count) == followed(tokens[:known], count)


@pytest.mark.once
def test_ngrams_of_a_long_text_cost_no_more() -> None:
    """Each token is noted once, however often is asked."""
    drafter = NgramDrafter()
    noted = []
    drafter._note = lambda tokens, place: noted.append(place)  # type: ignore[method-assign]
    tokens = list(range(300))
    for known in range(100, 300):
        drafter.propose(tokens[:known], 4)
    assert noted == list(range(1, 299))


@pytest.mark.once
def test_ngrams_take_little_memory() -> None:
    """Of the prompt and the answer of each row."""
    draw = random.Random(0)
    tokens = [draw.randrange(50_000) for _ in range(20_000)]
    drafter = NgramDrafter()
    tracemalloc.start()
    drafter.propose(tokens, 4)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 250 * len(tokens)


@pytest.mark.once
def test_ngrams_that_are_everywhere() -> None:
    """The latest places count, of which few are compared."""
    tokens = [7, 8, 9, 1, 2, 3, 4, 5, *([6, 1, 2] * 1000), 8, 9, 1, 2]
    assert NgramDrafter().propose(tokens, 2) == [8, 9]


@pytest.mark.once
def test_what_is_no_draft() -> None:
    with pytest.raises(ValueError, match="draft_model 'n-gram': wanted a model, or"):
        drafts_of("n-gram", Communicator())


def continued(model: nn.Module, tokens: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from all that come before it."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
    return tokens[-count:]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba2"])
@pytest.mark.parametrize("where", ["one", "all", "split"])
def test_a_model_brings_itself_into_line(
    where: str, model_type: str, comm: Communicator
) -> None:
    """Whatever is accepted of what it drafted, and behind a long prompt.

    Its windows are full and its states have moved on when it has to go back.
    """
    root = comm.size - 1
    folder = saved(model_type, comm)
    whole, _ = mlxtp.load_model(folder, Communicator())
    drafts = {
        "one": lambda: ModelDrafts(whole if comm.rank == root else None, comm, root),
        "all": lambda: ModelDrafts(whole, comm),
        "split": lambda: ModelDrafts(mlxtp.load_model(folder, comm)[0], comm),
    }[where]()
    drafter, tokens = drafts.begin(chunk=7), LONG[:60]
    for _ in range(2):  # the first chunks of the prompt
        assert drafter.propose(tokens, 3) is None
    accepted_and_more = [(0, [1]), (3, [2]), (1, [3, 4]), (2, []), (3, []), (2, [5])]
    # It is not asked for a while: more than it reads when it drafts.
    for accepted, more in [*accepted_and_more, (1, LONG[60:85]), (0, [])]:
        drafted = drafter.propose(tokens, 3)
        assert drafted is not None
        assert drafted == continued(whole, tokens, 3)
        tokens = [*tokens, *drafted[:accepted], *more]


@pytest.mark.parametrize("where", ["one", "all"])
def test_prompts_are_read_in_turns(where: str, comm: Communicator) -> None:
    """At most a chunk in a pass, on every rank alike, and few logits are computed."""
    whole, _ = mlxtp.load_model(saved("llama", comm), Communicator())
    root = comm.size - 1 if where == "one" else None
    is_here = root in (None, comm.rank)
    drafts = ModelDrafts(whole if is_here else None, comm, root)
    read: list[tuple[int, bool]] = []
    former = type(whole).__call__

    class Counted(type(whole)):  # type: ignore[misc]
        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            read.append((tokens.shape[1], are_outputs_unread()))
            return former(self, tokens, cache=cache)

    if is_here:
        drafts.model = copy.copy(whole)
        drafts.model.__class__ = Counted
    asked = [(drafts.begin(chunk=40), LONG[:length], 2) for length in (90, 10, 60)]
    passes = []
    for _ in range(5):
        read.clear()
        passes.append([x is not None for x in drafts.propose(asked)])
        assert sum(count for count, is_unread in read if is_unread) <= 40
        assert max((n for n, is_unread in read if not is_unread), default=0) <= (
            FEW_TOKENS
        )
        asked = [(x, [*tokens, 1], n) for x, tokens, n in asked]
    assert passes == [
        [False, True, False],
        [True, True, False],
        [True, True, False],
        [True, True, True],
        [True, True, True],
    ]
    for (_, tokens, _), drafted in zip(asked, drafts.propose(asked), strict=True):
        assert drafted == continued(whole, tokens, 2)


@pytest.mark.parametrize("where", ["one", "all"])
def test_a_token_that_the_draft_has_no_row_for(where: str, comm: Communicator) -> None:
    """Nothing is drafted behind it, on any rank, and other sequences go on."""
    whole, _ = mlxtp.load_model(saved("llama", comm), Communicator())
    root = comm.size - 1 if where == "one" else None
    is_here = root in (None, comm.rank)
    drafts = ModelDrafts(whole if is_here else None, comm, root)
    assert drafts.rows == whole.slice_table.vocabulary_rows
    tokens, beyond = LONG[:9], [*LONG[:9], drafts.rows]
    one, other = drafts.begin(), drafts.begin()
    assert one.propose(tokens, 2) == continued(whole, tokens, 2)
    for more in ([], [1, 2]):
        result = drafts.propose(
            [(one, [*beyond, *more], 2), (other, [*tokens, *more], 2)]
        )
        assert result == [[], continued(whole, [*tokens, *more], 2)]
    assert one.propose([*beyond, 1, 2, 3], 2) == []

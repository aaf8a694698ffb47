"""What drafts: tokens that may come next, for the model to accept or reject.

A maker (`Drafts`) holds what sequences share, such as a draft model. Each sequence has
a `Drafter` of its own. On all ranks a drafter proposes the same tokens.
"""

from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from mlxtp.comm.communicator import Communicator
from mlxtp.generation.agreed import agreed
from mlxtp.generation.choices import NGRAM
from mlxtp.generation.drawing import normalized
from mlxtp.generation.pays import MOST
from mlxtp.generation.rollback import Point
from mlxtp.layers.sums import outputs_unread

# Draws a token: log-probabilities (1, V), and how many tokens of the sequence are
# before it -> (1,).
Draw = Callable[[mx.array, int], mx.array]

# So many of the last tokens are looked for, and the last ones at least.
NGRAM_MOST, NGRAM_LEAST = 5, 2
# In the latest places of the last ones: so many are compared.
PLACES_COMPARED = 64

# A draft model reads a prompt in chunks of so many tokens, unless told.
CHUNK_TOKENS = 512
# What it lacks at most behind a pass. It reads no more than this when it drafts.
FEW_TOKENS = MOST + 1


class Drafter(Protocol):
    """Drafts for one sequence.

    It keeps what it knows of the sequence, such as caches, and brings that into line by
    itself: nobody tells it what was accepted.
    """

    def propose(self, tokens: Sequence[int], count: int) -> list[int] | None:
        """Propose at most `count` tokens that may follow `tokens`.

        Every rank calls it alike and gets the same list. None says that it has read a
        part of the tokens and has not come to the last.

        Args:
            tokens: all that are known of the sequence, prompt and answer. They begin
                with those of the call before, and there are more of them.
            count: at least 1.
        """
        ...


class Drafts(Protocol):
    """Makes drafters, one for each sequence."""

    def begin(self, draw: Draw | None = None, chunk: int = CHUNK_TOKENS) -> Drafter:
        """Make the drafter of a new sequence.

        Args:
            draw: draws as the model's tokens are drawn, so that good drafts are
                accepted; None takes the likeliest.
            chunk: the most tokens of a prompt that are read at once.
        """
        ...

    def propose(
        self, asked: Sequence[tuple[Any, Sequence[int], int]]
    ) -> Sequence[list[int] | None]:
        """Let several of its drafters propose, for one pass.

        Together they read no more than a chunk of prompts.

        Args:
            asked: drafters, with what `Drafter.propose` takes.
        """
        ...


def drafts_of(what: nn.Module | Drafts | str, comm: Communicator) -> Drafts:
    """Make of what a caller gives for a draft what drafts.

    Args:
        what: "ngram", a model that is split over `comm`, or drafts as they are.
        comm: the ranks of the model that is drafted for.

    Raises: ValueError for another name.
    """
    if isinstance(what, nn.Module):
        return ModelDrafts(what, comm)
    if not isinstance(what, str):
        return what
    if what != NGRAM:
        raise ValueError(f"draft_model {what!r}: wanted a model, or {NGRAM!r}")
    return NgramDrafts()


class NgramDrafts:
    """Drafts without a model: what followed the last tokens before.

    Strong where a text repeats itself or its prompt, as code and summaries do.
    """

    def begin(
        self, draw: Draw | None = None, chunk: int = CHUNK_TOKENS
    ) -> "NgramDrafter":
        """Make the drafter of a new sequence."""
        return NgramDrafter()

    def propose(
        self, asked: "Sequence[tuple[NgramDrafter, Sequence[int], int]]"
    ) -> list[list[int]]:
        """Let the drafters of several sequences propose."""
        return [drafter.propose(tokens, count) for drafter, tokens, count in asked]


class NgramDrafter:
    """Looks for the last tokens in prompt and answer: the latest place where they were.

    A token costs the same however long the sequence is: the places of two tokens are a
    chain, from the latest back. It takes some 150 bytes a token.
    """

    def __init__(self) -> None:
        # A place is how many tokens are before what followed; 0 is none.
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier = array("i", [0])  # of the same tokens, by place
        self._noted = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Propose what followed the longest match; nothing if there is none."""
        for place in range(max(1, self._noted), len(tokens)):
            self._note(tokens, place)
        self._noted = len(tokens)
        place = self._latest.get(tuple(tokens[-NGRAM_LEAST:]), 0)
        best = longest = 0
        for _ in range(PLACES_COMPARED):
            if place == 0 or longest == NGRAM_MOST:
                break
            alike = _alike(tokens, place)
            if alike > longest:
                best, longest = place, alike
            place = self._earlier[place]
        return self._copied(tokens, best, count) if best else []

    def _note(self, tokens: Sequence[int], place: int) -> None:
        """Note the token at `place` as what follows those before it."""
        if place < NGRAM_LEAST:
            self._earlier.append(0)
            return
        last = tuple(tokens[place - NGRAM_LEAST : place])
        self._earlier.append(self._latest.get(last, 0))
        self._latest[last] = place

    @staticmethod
    def _copied(tokens: Sequence[int], place: int, count: int) -> list[int]:
        """Copy from `place` on, and what was copied too where it reaches the end."""
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(count)]


def _alike(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` are the last ones, up to `NGRAM_MOST`."""
    most = min(NGRAM_MOST, place)
    for back in range(NGRAM_LEAST + 1, most + 1):
        if tokens[place - back] != tokens[-back]:
            return back - 1
    return most


class ModelDrafts:
    """Drafts of a model that is smaller than the one it drafts for.

    The model is either whole on one rank, `root`, which hands on what it drafts; or it
    is called on every rank alike, whole on each or split over them.

    Args:
        model: as `mlxtp.load` gives it. A whole one is loaded with a `Communicator` of
            one rank. None on ranks that do not have it.
        comm: the ranks that need the drafts.
        root: the rank that computes; None for all.

    Attributes:
        rows: how many tokens the model knows (V).

    Communicates: one object, where one rank computes.
    """

    def __init__(
        self, model: nn.Module | None, comm: Communicator, root: int | None = None
    ) -> None:
        self.model, self.comm, self.root = model, comm, root
        self.agree = agreed(lambda tokens: tokens, comm)
        rows: Any = None if model is None else model.slice_table.vocabulary_rows
        self.rows: int = rows if root is None else comm.bcast_object(rows, root)

    @property
    def is_here(self) -> bool:
        """Whether this rank computes."""
        return self.root in (None, self.comm.rank)

    def begin(
        self, draw: Draw | None = None, chunk: int = CHUNK_TOKENS
    ) -> "ModelDrafter":
        """Make the drafter of a new sequence."""
        return ModelDrafter(self, draw, chunk)

    def propose(
        self, asked: "Sequence[tuple[ModelDrafter, Sequence[int], int]]"
    ) -> list[list[int] | None]:
        """Let the drafters of several sequences propose: tokens and counts as theirs.

        Communicates: what `ModelDrafter.propose` does, but one broadcast for all.
        """
        result: list[list[int] | None] = [[] for _ in asked]
        left = max(drafter.chunk for drafter, _, _ in asked)
        ready: list[int] = []
        for at, (drafter, tokens, _) in enumerate(asked):
            if not drafter.knows_all(tokens):
                continue
            left -= drafter.catch_up(tokens, left)
            if drafter.lacking(tokens) <= FEW_TOKENS:
                ready.append(at)
            else:
                result[at] = None
        # Something is broadcast in any case: nobody waits for more than one chunk.
        size = sum(asked[at][2] for at in ready)
        drafted = mx.zeros((max(1, size),), mx.int32)
        if ready and self.is_here:
            drafted = mx.concatenate(
                [x.draft(tokens, n) for x, tokens, n in (asked[at] for at in ready)]
            )
        if self.root is not None:
            drafted = self.comm.bcast(drafted, self.root, at="the draft")
        numbers: Any = drafted.tolist()
        every = iter(numbers)
        for at in ready:
            drafter, tokens, count = asked[at]
            result[at] = of_one = list(islice(every, count))
            drafter.note(tokens, of_one)
        return result


class ModelDrafter:
    """Drafts of a model for one sequence.

    How far it is follows from what it was asked, so every rank knows it, the ranks
    without the model as well.
    """

    def __init__(self, drafts: ModelDrafts, draw: Draw | None, chunk: int) -> None:
        self._drafts = drafts
        # With less it would not catch up with a sequence that goes on meanwhile.
        self.chunk = max(chunk, FEW_TOKENS)
        self._draw = draw or (lambda logprobs, _: greedy_sampler(logprobs))
        self._caches = make_prompt_cache(drafts.model) if drafts.is_here else []
        # The caches hold so many tokens that were known, where `_point` was set, and
        # behind them what was drafted.
        self._known = 0
        self._drafted: list[int] = []
        self._point = Point(self._caches)
        self._checked = 0  # so many tokens have a row in the model

    def propose(self, tokens: Sequence[int], count: int) -> list[int] | None:
        """Propose `count` tokens; none behind a token that the model has no row for.

        None while a prompt is being read, of which each call reads a chunk.

        Communicates: one broadcast of `count` elements from the rank that computes;
            where all do, what the model's forward passes do, and a broadcast for each
            token where machines differ.
        """
        (result,) = self._drafts.propose([(self, tokens, count)])
        return result

    def knows_all(self, tokens: Sequence[int]) -> bool:
        """Whether the model has a row for each of the tokens."""
        while self._checked < len(tokens):
            if tokens[self._checked] >= self._drafts.rows:
                return False
            self._checked += 1
        return True

    def lacking(self, tokens: Sequence[int]) -> int:
        """How many tokens were not known when it was asked before."""
        return len(tokens) - self._known

    def catch_up(self, tokens: Sequence[int], most: int) -> int:
        """Read at most `most` tokens where many are lacking, but not the last of all.

        Logits of so many would take much memory, and nobody reads them.

        Returns: how many were read.
        """
        lacking = self.lacking(tokens)
        count = min(lacking - 1, most) if lacking > FEW_TOKENS else 0
        if count == 0:
            return 0
        if self._drafts.is_here:
            self._point.take_back(len(self._drafted))
            with outputs_unread():
                self._logits(mx.array([*tokens[self._known : self._known + count]]))
            mx.eval([cache.state for cache in self._caches])
            self._point = Point(self._caches)
        self._known += count
        self._drafted = []
        return count

    def note(self, tokens: Sequence[int], drafted: Sequence[int]) -> None:
        """Note what `draft` gave behind `tokens`, which is known now."""
        self._known = len(tokens)
        self._drafted = list(drafted[:-1])  # the last is not read

    def draft(self, tokens: Sequence[int], count: int) -> mx.array:
        """Draft tokens (count,), one behind another."""
        logits = self._logits(mx.array([*tokens[self._take_back(tokens) :]]))
        self._point = Point(self._caches)
        drafted: list[mx.array] = []
        for position in range(len(tokens), len(tokens) + count):
            if drafted:
                logits = self._logits(drafted[-1])
            logprobs = normalized(logits)
            token = self._draw(logprobs, position)
            if self._drafts.root is None:
                token = self._drafts.agree(token)
            mx.async_eval(token)  # type: ignore[no-untyped-call]
            drafted.append(token)
        return mx.concatenate(drafted).astype(mx.int32)

    def _take_back(self, tokens: Sequence[int]) -> int:
        """Take out of the caches what is none of `tokens`; how many they hold now."""
        right = 0
        for drafted, token in zip(
            self._drafted, tokens[self._known : -1], strict=False
        ):
            if drafted != token:
                break
            right += 1
        was_cut = self._point.take_back(len(self._drafted) - right)
        return self._known + (right if was_cut else 0)

    def _logits(self, tokens: mx.array) -> mx.array:
        """Read tokens (L,); logits (1, V) of what follows."""
        model: Any = self._drafts.model
        logits: mx.array = model(tokens[None], cache=self._caches)
        return logits[:, -1]

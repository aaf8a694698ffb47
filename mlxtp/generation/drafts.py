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
from mlxtp.generation.rollback import Point
from mlxtp.layers.sums import outputs_unread

# Draws a token: log-probabilities (1, V), and how many tokens of the sequence are
# before it -> (1,).
Draw = Callable[[mx.array, int], mx.array]

# The name of drafts that need no model.
NGRAM = "ngram"
# So many of the last tokens are looked for, and the last ones at least.
NGRAM_MOST, NGRAM_LEAST = 5, 2
# In the latest places of the last ones: so many are compared.
PLACES_COMPARED = 64

# A draft model reads what it lacks in chunks of so many tokens, unless told.
CHUNK_TOKENS = 512


class Drafter(Protocol):
    """Drafts for one sequence.

    It keeps what it knows of the sequence, such as caches, and brings that into line by
    itself: nobody tells it what was accepted.
    """

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Propose at most `count` tokens that may follow `tokens`.

        Every rank calls it alike and gets the same list.

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
    ) -> list[list[int]]:
        """Let several of its drafters propose, for one pass.

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
    """

    def __init__(
        self, model: nn.Module | None, comm: Communicator, root: int | None = None
    ) -> None:
        self.model, self.comm, self.root = model, comm, root
        self.agree = agreed(lambda tokens: tokens, comm)

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
    ) -> list[list[int]]:
        """Let the drafters of several sequences propose: tokens and counts as theirs.

        Communicates: what `ModelDrafter.propose` does, but one broadcast for all.
        """
        counts = [count for _, _, count in asked]
        drafted = mx.zeros((sum(counts),), mx.int32)
        if self.is_here:
            drafted = mx.concatenate(
                [drafter.draft(tokens, count) for drafter, tokens, count in asked]
            )
        if self.root is not None:
            drafted = self.comm.bcast(drafted, self.root, at="the draft")
        numbers: Any = drafted.tolist()
        every = iter(numbers)
        result = [list(islice(every, count)) for count in counts]
        for (drafter, _, _), of_one in zip(asked, result, strict=True):
            drafter.note(of_one)
        return result


class ModelDrafter:
    """Drafts of a model for one sequence."""

    def __init__(self, drafts: ModelDrafts, draw: Draw | None, chunk: int) -> None:
        self._drafts, self._chunk = drafts, chunk
        self._draw = draw or (lambda logprobs, _: greedy_sampler(logprobs))
        self._caches = make_prompt_cache(drafts.model) if drafts.is_here else []
        # The caches hold so many tokens that were known, where `_point` was set, and
        # behind them what was drafted.
        self._known = 0
        self._drafted: list[int] = []
        self._point = Point(self._caches)

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Propose `count` tokens.

        Communicates: one broadcast of `count` elements from the rank that computes;
            where all do, what the model's forward passes do, and a broadcast for each
            token where machines differ.
        """
        (result,) = self._drafts.propose([(self, tokens, count)])
        return result

    def note(self, drafted: Sequence[int]) -> None:
        """Note what `draft` gave, which is known now."""
        self._drafted = list(drafted[:-1])  # the last is not read

    def draft(self, tokens: Sequence[int], count: int) -> mx.array:
        """Draft tokens (count,), one behind another."""
        unread = list(tokens[self._take_back(tokens) :])
        while len(unread) > self._chunk:
            with outputs_unread():
                self._logits(mx.array(unread[: self._chunk]))
            mx.eval([cache.state for cache in self._caches])
            unread = unread[self._chunk :]
        logits = self._logits(mx.array(unread))
        self._known, self._point = len(tokens), Point(self._caches)
        drafted: list[mx.array] = []
        for position in range(len(tokens), len(tokens) + count):
            if drafted:
                logits = self._logits(drafted[-1])
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
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

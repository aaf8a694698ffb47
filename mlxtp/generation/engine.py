"""The passes that all ranks make for the requests of a server.

Rank 0 decides what is done in a pass (`generation.scheduler`), and every rank does it
(`Engine.run`): requests join and leave, one token a row is decoded, and a part of a
prompt is read. What rank 0 decides next travels while this pass computes.

In a pass the forward pass of all rows begins first. Its input are the tokens that the
last pass drew: they are known as soon as it has begun. So grammars, what ends a text,
and rank 0's next step are worked out while the ranks compute; then the next tokens are
drawn from the logits.

A pass with drafts reads several tokens a row, and so waits for what the last one drew,
which the drafts go on from. What each place would draw is drawn at once, since all that
its draw depends on is known: the tokens before it, if they are right, are the drafts.
Drafts are accepted while they are what is drawn, and the caches are taken back behind
them, each row's for itself.
"""

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import Sampler, greedy_sampler
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mlxtp.generation.agreed import agreed
from mlxtp.generation.drafts import CHUNK_TOKENS, Drafter, Drafts
from mlxtp.generation.drawing import Processors, Score, Scores, normalized, samplers
from mlxtp.generation.grammar import Grammars, Matcher
from mlxtp.generation.halves import Halves
from mlxtp.generation.pays import MOST
from mlxtp.generation.prefix_cache import PrefixStore
from mlxtp.generation.rollback import MOST_PENDING, Point
from mlxtp.generation.rows import Caches, Rows
from mlxtp.generation.sampling import draw
from mlxtp.generation.step import Admission, Step
from mlxtp.layers.sums import outputs_unread

# Between two of these passes MLX keeps the memory that it does not need any more.
CLEAR_PASSES = 256
# And behind parts of prompts of so many tokens, whose arrays are large.
CLEAR_TOKENS = 256


@dataclass(frozen=True)
class Drawn:
    """A token that a request got, and its `Score` if it asked for it."""

    token: int
    score: Score | None = None


@dataclass
class Result:
    """What a pass has given, the same on every rank.

    `drawn` are the tokens of rows that decode, by id; `read` the scores of prompts that
    have been read to the end, None for requests that did not ask. `refused` could not
    begin, for the reason that is given, and are forgotten. `stuck` are rows whose
    grammar cannot be followed any further: they are to be dropped.

    `drafted` are the numbers of drafted and of accepted tokens of rows that were asked
    to draft, by id, but for those whose drafter reads a prompt first: `drafts_read`
    says that there are some, and times are no usual ones. `draft_seconds` is what
    drafting took on this rank. Behind a pass of `width` tokens a row the last token of
    each is known, and is not in its caches.
    A `width` of 0 is a pass whose token is on its way: caches hold all that are known.
    """

    drawn: dict[str, list[Drawn]] = field(default_factory=dict)
    read: dict[str, list[Score] | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    stuck: dict[str, str] = field(default_factory=dict)
    drafted: dict[str, tuple[int, int]] = field(default_factory=dict)
    draft_seconds: float = 0.0
    drafts_read: bool = False
    width: int = 0


class _Reader:
    """A prompt that is being read: all but its last token, which begins decoding."""

    def __init__(self, admission: Admission, caches: Caches) -> None:
        self.request = admission.request
        self.tokens = admission.request.tokens
        self.done = admission.cached
        self.caches = caches
        self.scores: list[Scores] = []

    @property
    def is_read(self) -> bool:
        return self.done == len(self.tokens) - 1


class _Row:
    """A request that decodes.

    Attributes:
        tokens: all that are known, prompt and answer.
        pending: the last of them, which its caches lack. None while the next token is
            on its way.
    """

    def __init__(
        self, reader: _Reader, sampler: Sampler, matcher: Matcher | None
    ) -> None:
        self.request = reader.request
        self.settings = reader.request.settings
        self.matcher = matcher
        self.tokens = list(reader.tokens)
        self.pending = self.tokens[-1:]
        self.sampler = sampler
        generated = self.tokens[reader.request.prompt_length :]
        self.processors = Processors(self.settings, reader.tokens, generated)
        self.scores: Scores | None = None  # of the token that was drawn last
        self.drafter: Drafter | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token of the model."""
        return (
            self.sampler is greedy_sampler
            and self.matcher is None
            and not self.processors.any
        )

    @property
    def held(self) -> list[int]:
        """The tokens that its caches hold."""
        return self.tokens[: len(self.tokens) - len(self.pending)]

    def draw(self, logits: mx.array, draft: Sequence[int] = ()) -> mx.array:
        """Draw the next token, and those that come if the draft is right so far.

        Shapes: logits (N, V), draft (N - 1,) -> (M,), where M <= N: a grammar may end
            the draft.
        """
        masks = self.matcher.masks(draft) if self.matcher else [None] * len(logits)
        places = zip(masks, mx.split(logits, len(logits)), strict=False)
        return mx.concatenate(
            [
                self._draw(x, mask, draft[:place])
                for place, (mask, x) in enumerate(places)
            ]
        )

    def _draw(self, logits: mx.array, mask: Any, before: Sequence[int]) -> mx.array:
        """Draw the token behind `before`, tokens that are not noted: (1, V) -> (1,)."""
        logits = self.processors(logits, before)
        if mask is not None:
            logits = mx.where(mx.array(mask), logits, -mx.inf)
        return self.sample(normalized(logits), len(self.tokens) + len(before))

    def sample(self, logprobs: mx.array, position: int) -> mx.array:
        """Draw a token at a position: (1, V) -> (1,)."""
        if self.sampler is greedy_sampler:
            return greedy_sampler(logprobs)
        return draw(self.sampler, logprobs, self.settings.seed, position)

    def add(self, token: int) -> None:
        """Note a token that was drawn."""
        self.tokens.append(token)
        self.processors.add(token)
        if self.matcher is not None:
            self.matcher.accept(token)


class Engine:
    """Makes the passes of one model, alike on every rank.

    Args:
        model: as `mlxtp.load` gives it.
        store: the caches of the prefix cache.
        grammars: of the model's tokenizer.
        rows: how many tokens the model knows (V).
        drafts: makes the drafters of rows; None where nothing is drafted.
        chunk: the most tokens of prompts that drafters read in a pass.
        ends: tokens that end a text: what is drafted behind them is not accepted.
        never_excluded: tokens that XTC leaves in, as mlx-lm's programs have them.
        kv_bits, kv_group_size, quantized_kv_start: mlx-lm's; with `kv_bits` there is
            one row at most.
    """

    def __init__(
        self,
        model: nn.Module,
        store: PrefixStore,
        grammars: Grammars,
        rows: int,
        *,
        drafts: Drafts | None = None,
        chunk: int = CHUNK_TOKENS,
        ends: Collection[int] = (),
        never_excluded: Sequence[int] = (),
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
    ) -> None:
        self._model = model
        self._store = store
        self._grammars = grammars
        self._drafts, self._chunk, self._ends = drafts, chunk, frozenset(ends)
        self._tokens = rows
        self._sampler = samplers(rows, never_excluded)
        self._quantized: dict[str, Any] = dict(
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
        )
        self._rows = Rows()
        self._of: dict[str, _Row] = {}
        self._readers: dict[str, _Reader] = {}
        self._matchers: dict[str, Matcher] = {}  # of prompts that are read
        self._drawn: tuple[list[str], mx.array] | None = None
        self._last: _Reader | None = None  # that was read last, if it is still there
        self._agree = agreed(lambda tokens: tokens, model.comm)
        self._halves = Halves(model)
        self._halves.costs()  # while nobody waits
        self._passes = 0
        maybe_set_recommended_wired_limit()  # of a GPU of Apple's

    def run(self, step: Step) -> Result:
        """Make one pass.

        Communicates: what the model's forward passes do.
        """
        result = Result()
        self._change(step, result)
        if self._rows.ids:
            self._decode(dict(step.draft), result)
        else:
            self._drawn = None  # rows that were set back draw these tokens again
        reading = [part for part in step.read if part[0] not in result.refused]
        for name, count in reading:
            self._read(self._readers[name], count)
        # Of one token, or of what the prefix cache has, nothing is left to be read.
        begun = [x.request.id for x in step.admit if x.request.id in self._readers]
        for name in dict.fromkeys([*begun, *(name for name, _ in reading)]):
            reader = self._readers[name]
            if reader.is_read:
                scores = [score for x in reader.scores for score in x.evaluated()]
                asked = reader.request.settings.prompt_logprobs is not None
                result.read[name] = scores if asked else None
        self._passes += 1
        read = sum(count for _, count in reading)
        if self._passes % CLEAR_PASSES == 0 or read >= CLEAR_TOKENS:
            mx.clear_cache()
        return result

    def _change(self, step: Step, result: Result) -> None:
        """Let requests go and come."""
        # What is put into the prefix cache takes the place of what goes.
        taken = {admission.key for admission in step.admit}
        self._store.drop(key for key in step.forget if key not in taken)
        for name, key in step.keep:
            reader = self._readers.get(name)
            if reader is not None:
                tokens = reader.tokens[: reader.done]
                self._store.put(key, tokens, copy.deepcopy(reader.caches))
            else:
                self._read_pending()
                self._store.put(key, self._of[name].held, self._rows.extract(name))
        for name in step.drop:
            self._readers.pop(name, None)
            self._matchers.pop(name, None)
            self._of.pop(name, None)
        self._rows.drop(step.drop)
        for admission in step.admit:
            self._admit(admission, result)
        self._store.drop(key for key in step.forget if key in taken)
        joining = [self._readers.pop(name) for name in step.join]
        for reader in joining:
            name = reader.request.id
            sampler = self._sampler(reader.request.settings)
            self._of[name] = _Row(reader, sampler, self._matchers.pop(name, None))
        if joining and self._rows.ids:
            self._read_pending()  # rows of a batch have one such token each
        self._rows.join(list(step.join), [reader.caches for reader in joining])
        if self._last not in self._readers.values():
            self._last = None  # its caches are copied in a batch

    def _admit(self, admission: Admission, result: Result) -> None:
        request = admission.request
        grammar = request.settings.grammar
        if grammar is not None:
            generated = request.tokens[request.prompt_length :]
            try:
                matcher = self._grammars.matcher(grammar, generated)
            except ValueError as error:
                result.refused[request.id] = str(error)
                return
            self._matchers[request.id] = matcher
        if admission.key is None:
            caches = make_prompt_cache(self._model)
        else:
            caches = self._store.take(admission.key, admission.cached)
        self._readers[request.id] = _Reader(admission, caches)

    def _read_pending(self) -> None:
        """Let the caches of a row alone hold all known tokens but the last."""
        row = self._of[self._rows.ids[0]]
        if len(row.pending) > 1:
            with outputs_unread():
                tokens = mx.array(row.pending[:-1])[None]
                self._model(tokens, cache=self._rows.caches)
            self._quantize(self._rows.caches)
            row.pending = row.pending[-1:]

    def _decode(self, asked: Mapping[str, int], result: Result) -> None:
        """Compute the logits of every row, and draw its next tokens."""
        rows = [self._of[name] for name in self._rows.ids]
        if asked:
            self._take_drawn(result)
            drafts = self._propose(rows, asked, result)
            if any(drafts):
                self._decode_drafts(rows, drafts, result)
                return
        logits = self._model(self._inputs(rows), cache=self._rows.caches)[:, -1]
        self._quantize(self._rows.caches)
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        self._take_drawn(result)
        for row in rows:
            row.pending = []
        if all(row.is_plain for row in rows):
            tokens = greedy_sampler(normalized(logits))
        else:
            pairs = zip(rows, mx.split(logits, len(rows)), strict=True)
            tokens = mx.concatenate([self._draw(row, x, result) for row, x in pairs])
        tokens = self._agree(tokens)
        computed = [tokens]
        for at, row in enumerate(rows):
            wanted = row.settings.logprobs
            if wanted is not None:
                this = slice(at, at + 1)
                row.scores = Scores.of(logits[this], tokens[this], wanted)
                computed += row.scores.arrays
        mx.async_eval(computed)  # type: ignore[no-untyped-call]
        self._drawn = list(self._rows.ids), tokens

    def _inputs(self, rows: Sequence[_Row]) -> mx.array:
        """The tokens that the rows go on with: (B, L).

        L is 1 but for a row alone, whose caches may lack more.
        """
        drawn: dict[str, mx.array] = {}
        if self._drawn is not None:
            names, tokens = self._drawn
            if names == self._rows.ids:
                return tokens[:, None]
            drawn = dict(zip(names, mx.split(tokens, len(names)), strict=True))
        inputs = [
            mx.array(row.pending, mx.uint32)
            if row.pending
            else drawn[row.request.id].astype(mx.uint32)
            for row in rows
        ]
        return mx.stack(inputs)

    def _take_drawn(self, result: Result) -> None:
        """Note what the last pass drew, for the rows that are still there."""
        if self._drawn is None:
            return
        names, drawn = self._drawn
        self._drawn = None
        tokens: Any = drawn.tolist()
        for name, token in zip(names, tokens, strict=True):
            row = self._of.get(name)
            if row is None:
                continue
            scores = row.scores.evaluated() if row.scores else [None]
            self._add(row, [token], scores, result)
            row.pending = [token]

    def _add(
        self,
        row: _Row,
        tokens: Sequence[int],
        scores: Sequence[Score | None],
        result: Result,
    ) -> None:
        """Note tokens that a row has got."""
        name = row.request.id
        for token, score in zip(tokens, scores, strict=True):
            try:
                row.add(token)
            except ValueError as error:
                row.matcher, result.stuck[name] = None, str(error)
            result.drawn.setdefault(name, []).append(Drawn(token, score))

    def _propose(
        self, rows: Sequence[_Row], asked: Mapping[str, int], result: Result
    ) -> list[list[int]]:
        """Let rows draft as many tokens as they are asked for, at most.

        Communicates: what drafters do.
        """
        begun = time.perf_counter()
        assert self._drafts is not None
        proposing: list[tuple[_Row, tuple[Drafter, Sequence[int], int]]] = []
        for row in rows:
            wanted = asked.get(row.request.id, 0)
            if not wanted:
                continue
            result.drafted[row.request.id] = 0, 0
            count = min(wanted, self._room(row))
            if count > 0:
                if row.drafter is None:
                    is_greedy = row.sampler is greedy_sampler
                    draw_alike = None if is_greedy else row.sample
                    row.drafter = self._drafts.begin(draw_alike, self._chunk)
                proposing.append((row, (row.drafter, row.tokens, count)))
        drafts: dict[str, list[int]] = {}
        if proposing:
            proposed = self._drafts.propose([one for _, one in proposing])
            for (row, _), draft in zip(proposing, proposed, strict=True):
                name = row.request.id
                if draft is None:  # its drafter reads the prompt: nothing to judge
                    del result.drafted[name]
                    result.drafts_read = True
                    continue
                # A draft model may know more tokens.
                draft = [*takewhile(lambda token: token < self._tokens, draft)]
                drafts[name] = draft
                result.drafted[name] = len(draft), 0
        result.draft_seconds = time.perf_counter() - begun
        return [drafts.get(row.request.id, []) for row in rows]

    def _room(self, row: _Row) -> int:
        """How many tokens a row can draft, by what its caches hold and lack."""
        if len(row.pending) > MOST_PENDING:
            return 0
        if self._quantized["kv_bits"] is None:
            return MOST
        # Tokens behind the start of quantized caches find those before them quantized.
        held, start = len(row.held), self._quantized["quantized_kv_start"]
        return MOST if held >= start else start - held - len(row.pending)

    def _decode_drafts(
        self, rows: Sequence[_Row], drafts: Sequence[list[int]], result: Result
    ) -> None:
        """Read the drafts of all rows, and take back what the model would not draw.

        Shorter rows are filled up: what that leaves in the caches is taken back too.
        """
        inputs = [[*row.pending, *x] for row, x in zip(rows, drafts, strict=True)]
        width = result.width = max(map(len, inputs))
        filled = [x + [0] * (width - len(x)) for x in inputs]
        self._rows.prepare()
        point = Point(self._rows.caches) if len(rows) == 1 else None
        logits = self._model(mx.array(filled, mx.uint32), cache=self._rows.caches)
        # What a row alone has pending besides its last token draws nothing.
        logits = logits[:, len(rows[0].pending) - 1 :]
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        counts = [len(draft) + 1 for draft in drafts]
        if all(row.is_plain for row in rows):
            tokens = greedy_sampler(normalized(logits))
        else:
            places = logits.shape[1]
            drawn = []
            for at, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
                x = self._draw(row, logits[at, : counts[at]], result, draft)
                counts[at] = 0 if row.request.id in result.stuck else len(x)
                drawn.append(mx.pad(x, (0, places - len(x))))
            tokens = mx.stack(drawn)
        tokens = self._agree(tokens)
        scores = [
            None
            if row.settings.logprobs is None
            else Scores.of(logits[at], tokens[at], row.settings.logprobs)
            for at, row in enumerate(rows)
        ]
        mx.eval(tokens, [x.arrays for x in scores if x is not None])
        lists: Any = tokens.tolist()
        rejected = []
        for at, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            right = self._accepted(row, lists[at][: counts[at]], draft)
            of_row = scores[at]
            told = [None] * len(right) if of_row is None else of_row.evaluated()
            self._add(row, right, told[: len(right)], result)
            if draft:
                result.drafted[row.request.id] = len(draft), max(0, len(right) - 1)
            # The last one was not read.
            read = len(row.pending) + len(right) - 1 if right else 0
            row.pending = [*row.pending, *right][read:]
            rejected.append(width - read)
        if point is None:
            self._rows.take_back(rejected)
        elif not point.take_back(rejected[0]):
            lacking = width - rejected[0] + len(rows[0].pending)
            rows[0].pending = rows[0].tokens[-lacking:]
        self._quantize(self._rows.caches)

    def _accepted(
        self, row: _Row, drawn: Sequence[int], draft: Sequence[int]
    ) -> list[int]:
        """The tokens that a row gets: those behind a wrong draft are none."""
        result: list[int] = []
        for place, token in enumerate(drawn):
            result.append(token)
            is_end = token in self._ends and not row.settings.ignore_eos
            if is_end or place == len(draft) or token != draft[place]:
                break
        return result

    def _draw(
        self,
        row: _Row,
        logits: mx.array,
        result: Result,
        draft: Sequence[int] = (),
    ) -> mx.array:
        """Draw the next tokens of a row: logits (N, V), draft (N - 1,) -> (M,)."""
        try:
            return row.draw(logits, draft)
        except ValueError as error:  # of its grammar
            row.matcher, result.stuck[row.request.id] = None, str(error)
            return row.draw(logits, draft)

    def _read(self, reader: _Reader, count: int) -> None:
        """Read so many tokens of a prompt."""
        # What was read before is done first: so a prompt that is cancelled leaves no
        # more than this part behind.
        if self._last is not None:
            mx.eval([cache.state for cache in self._last.caches])
        self._last = reader
        end = reader.done + count
        tokens = mx.array(reader.tokens[reader.done : end])[None]
        wanted = reader.request.settings.prompt_logprobs
        computed: list[Any] = []
        if wanted is None:
            with outputs_unread():
                self._halves(self._model, tokens, cache=reader.caches)
        else:
            logits = self._halves(self._model, tokens, cache=reader.caches)[0]
            following = mx.array(reader.tokens[reader.done + 1 : end + 1])
            reader.scores.append(Scores.of(logits, following, wanted))
            computed = reader.scores[-1].arrays
        self._quantize(reader.caches)
        reader.done = end
        computed.append([cache.state for cache in reader.caches])
        mx.async_eval(computed)  # type: ignore[no-untyped-call]

    def _quantize(self, caches: Caches) -> None:
        if self._quantized["kv_bits"] is not None:
            maybe_quantize_kv_cache(caches, **self._quantized)

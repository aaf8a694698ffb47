"""What rank 0 does for the front: it takes requests and tells what becomes of them."""

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from mlxtp.fetch.spare import Spare
from mlxtp.generation.drawing import Score
from mlxtp.generation.engine import Drawn, Result
from mlxtp.generation.prefix_cache import PrefixIndex, PrefixStore
from mlxtp.generation.scheduler import Scheduler
from mlxtp.generation.step import GenerationRequest, Step
from mlxtp.serve import messages
from mlxtp.serve.messages import Event, RankStats, Start
from mlxtp.serve.ranks.answer import AnswerText
from mlxtp.serve.ranks.link import Link
from mlxtp.serve.ranks.logprobs import token_logprob
from mlxtp.serve.ranks.text import Text

log = logging.getLogger(__name__)

# How often the front is told how the job is.
STATS_SECONDS = 1.0

# So many log-probabilities of a prompt are told in one message.
LOGPROBS_TOLD = 1024

# What a client reads of a text that could not be made.
BROKEN = "the server failed at the text of this answer; its log says more"


@dataclass
class _Open:
    """A request that is under way."""

    start: Start
    answer: AnswerText
    generated: int
    was_admitted: bool = False
    was_read: bool = False


class Service:
    """Decides the steps of all ranks, by what the front asks for.

    What goes wrong with the text of an answer, which rank 0 alone makes, ends that
    request, and nothing else.

    Args:
        link: to the front.
        text: the tokenizer's work.
        scheduler: decides the steps.
        prefixes: what the prefix cache holds.
        store: rank 0's part of it.
        spare: what is still to be kept of another host's slices.
        context: the most tokens of a request.
        ends: tokens that end a text.
        rows: how many tokens the model knows.
    """

    def __init__(
        self,
        link: Link,
        text: Text,
        scheduler: Scheduler,
        prefixes: PrefixIndex,
        store: PrefixStore,
        spare: Spare,
        *,
        context: int,
        ends: Collection[int],
        rows: int,
    ) -> None:
        self._link, self._text = link, text
        self._scheduler, self._prefixes, self._store = scheduler, prefixes, store
        self._context, self._ends, self._rows = context, frozenset(ends), rows
        self._open: dict[str, _Open] = {}
        self._spare = spare
        self._step = Step(is_idle=not spare.is_left)
        self._steps = 0
        self._last_pass: float | None = None
        self._last_counts = 0.0

    def decide(self) -> Step:
        """Decide the next step; waits for the front if there is nothing to do."""
        while True:
            for message in self._link.take(wait=self._step.is_idle):
                match message:
                    case Start():
                        self._take(message)
                    case messages.Cancel(name):
                        self._open.pop(name, None)
                        self._scheduler.end(name)
                    case messages.End():
                        return Step(is_end=True)
            if not self._scheduler.is_idle:
                break
            if not self._step.is_idle:
                self._last_pass = None
                writes = self._store.has_unwritten
                spares = not writes and self._spare.is_left
                is_idle = not writes and not spares
                self._step = Step(
                    writes=writes, spares=spares, is_idle=is_idle, counts=is_idle
                )
                return self._step
        step = self._scheduler.decide()
        now = time.monotonic()
        if now - self._last_counts >= STATS_SECONDS:
            self._last_counts = now
            step = replace(step, counts=True)
        self._step = step
        # Before the pass: where it ends the ranks, the front knows who was in it.
        if admitted := [*self._admitted()]:
            self._link.send(messages.Events(admitted))
        return step

    def report(self, result: Result) -> None:
        """Tell the front what a pass has given."""
        now = time.monotonic()
        last = None if result.drafts_read else self._last_pass
        self._scheduler.passed(
            None if last is None else now - last,
            result.width,
            result.drafted,
            result.draft_seconds,
        )
        self._last_pass = now
        self._steps += 1
        events: list[Event] = []
        for event in self._read(result):
            events.append(event)
            if event.prompt_logprobs is not None:  # a line of its own, they are long
                self._link.send(messages.Events(events))
                events = []
        events += [*self._drawn(result), *self._failed(result)]
        if events:
            self._link.send(messages.Events(events))

    def tell_counts(self, ranks: list[RankStats]) -> None:
        """Tell the front how the job is; `ranks` is what each rank has counted."""
        scheduler, prefixes = self._scheduler, self._prefixes
        self._link.send(
            messages.Stats(
                running=scheduler.running,
                waiting=scheduler.waiting,
                cache_use=scheduler.use,
                prefix_entries=len(prefixes),
                prefix_bytes=max(prefixes.nbytes),
                prefix_queries=scheduler.looked_up_tokens,
                prefix_hits=scheduler.found_tokens,
                preemptions=scheduler.preemptions,
                steps=self._steps,
                step_seconds=scheduler.pace.decode_seconds,
                ranks=ranks,
                **self._drafts(),
            )
        )

    def _drafts(self) -> dict[str, int]:
        """What `Stats` say of drafts."""
        drafts = self._scheduler.draft_lengths
        if drafts is None:
            return {}
        return {
            "drafts": drafts.rounds,
            "drafted": drafts.drafted,
            "accepted": drafts.accepted,
        }

    def _take(self, start: Start) -> None:
        """Take a request, or say what is wrong with it."""
        mistake = self._mistake(start)
        if mistake is not None:
            event = Event(start.id, finish="error", error=mistake, is_mistake=True)
            self._link.send(messages.Events([event]))
            return
        try:
            answer = AnswerText(self._text, start)
            told = self._told_at_once(start, answer)
        except Exception:
            self._link.send(messages.Events([self._broken(start.id)]))
            return
        if told is not None:
            self._link.send(messages.Events([told]))
            if told.finish is not None:
                return
        self._open[start.id] = _Open(start, answer, len(start.generated))
        self._scheduler.submit(
            GenerationRequest(
                start.id,
                (*start.prompt, *start.generated),
                len(start.prompt),
                start.settings,
                tuple(start.boundaries),
            )
        )

    def _told_at_once(self, start: Start, answer: AnswerText) -> Event | None:
        """What is told of the tokens that a request has, to a new client or at the end.

        None where it goes on and its client knows them.
        """
        if not start.generated:
            return None
        tells, finish = start.tells_generated, self._finish_of(start, answer)
        if not tells and finish is None:
            return None
        pieces = answer.replayed if tells else []
        if finish is not None:
            pieces = [*pieces, *answer.finish(finish)]
        if finish == "stop" and answer.has_tool_calls:
            finish = "tool_calls"
        return Event(
            start.id,
            tokens=start.generated if tells else [],
            pieces=pieces,
            finish=finish,
            stop=answer.stopped,
            is_told_again=tells,
        )

    def _broken(self, name: str) -> Event:
        """End a request whose text has just raised an exception."""
        log.exception("the text of request %s failed", name)
        self._open.pop(name, None)
        self._scheduler.end(name)
        return Event(name, finish="error", error=BROKEN)

    def _finish_of(self, start: Start, answer: AnswerText) -> str | None:
        """Return how an answer ends that was generated before; None if it goes on.

        There may be less room for it than there was.
        """
        if start.finished is not None:
            return start.finished
        is_end = start.generated[-1] in self._ends and not start.settings.ignore_eos
        if is_end or answer.is_over:
            return "stop"
        length = len(start.prompt) + len(start.generated)
        is_full = len(start.generated) == start.settings.max_tokens
        return "length" if is_full or length >= self._context else None

    def _mistake(self, start: Start) -> str | None:
        """Say what is wrong with a request, as far as the ranks must know."""
        if not start.prompt:
            return "the prompt has no tokens"
        last = len(start.prompt) + (start.settings.max_tokens != 0)
        if last > self._context and not start.generated:
            return (
                f"the prompt has {len(start.prompt):,} tokens; there is room for "
                f"{self._context:,}, prompt and answer"
            )
        named = (*start.prompt, *start.settings.logit_bias)
        beyond = next((x for x in named if not 0 <= x < self._rows), None)
        if beyond is not None:
            return f"token {beyond} is none of the model's: it has {self._rows}"
        return None

    def _failed(self, result: Result) -> Iterator[Event]:
        for name in result.refused:
            self._scheduler.forget(name)
        for name in result.stuck:
            self._scheduler.end(name)
        for name, words in (*result.refused.items(), *result.stuck.items()):
            if self._open.pop(name, None) is not None:
                yield Event(name, finish="error", error=words, is_mistake=True)

    def _admitted(self) -> Iterator[Event]:
        for admission in self._step.admit:
            under_way = self._open.get(admission.request.id)
            if under_way is not None and not under_way.was_admitted:
                under_way.was_admitted = True
                yield Event(
                    admission.request.id, admitted=True, cached=admission.cached
                )

    def _read(self, result: Result) -> Iterator[Event]:
        for name, scores in result.read.items():
            under_way = self._open.get(name)
            # One that was set back is read again, and has been told of.
            if under_way is None or under_way.was_read:
                continue
            under_way.was_read = True
            prompt = under_way.start.prompt
            if scores is not None:
                try:
                    yield from self._prompt_logprobs(name, prompt, scores)
                except Exception:
                    yield self._broken(name)
                    continue
            ends = under_way.start.settings.max_tokens == 0
            if scores is not None or ends:
                yield Event(name, read=len(prompt), finish="length" if ends else None)
            if ends:
                self._end(name)

    def _prompt_logprobs(
        self, name: str, prompt: Sequence[int], scores: Sequence[Score]
    ) -> Iterator[Event]:
        """Tell how likely the tokens of a prompt are, in parts."""
        # One token begins the prompt, and nothing says how likely it is.
        yield Event(name, prompt_logprobs=[None])
        following = zip(prompt[1:], scores, strict=False)
        for pairs in iter(lambda: [*islice(following, LOGPROBS_TOLD)], []):
            part = (self._logprob(token, score) for token, score in pairs)
            yield Event(name, prompt_logprobs=[*part])

    def _drawn(self, result: Result) -> Iterator[Event]:
        for name, several in result.drawn.items():
            # All of them are in the row's caches, though the text may end before.
            for drawn in several:
                self._scheduler.add(name, drawn.token)
            for drawn in several:
                under_way = self._open.get(name)
                if under_way is None:
                    continue
                try:
                    event = self._token(name, under_way, drawn)
                except Exception:
                    event = self._broken(name)
                yield event

    def _token(self, name: str, under_way: _Open, drawn: Drawn) -> Event:
        """Take the text of a token, and see whether it is the last one."""
        start, answer, token = under_way.start, under_way.answer, drawn.token
        under_way.generated += 1
        pieces, finish = [], None
        if token in self._ends and not start.settings.ignore_eos:
            finish = "stop"
        else:
            pieces = answer.push(token)
            if answer.is_over:
                finish = "stop"
            elif under_way.generated == start.settings.max_tokens or (
                len(start.prompt) + under_way.generated >= self._context
            ):
                finish = "length"
        if finish is not None:
            pieces = [*pieces, *answer.finish(finish)]
            if finish == "stop" and answer.has_tool_calls:
                finish = "tool_calls"
            self._end(name)
        logprobs = []
        if drawn.score is not None:
            logprobs = [self._logprob(token, drawn.score)]
        return Event(
            name,
            tokens=[token],
            pieces=pieces,
            logprobs=logprobs,
            finish=finish,
            stop=answer.stopped,
        )

    def _logprob(self, token: int, score: Score) -> messages.TokenLogprob:
        tokens, logprobs = zip(*score.top, strict=True) if score.top else ((), ())
        return token_logprob(self._text, token, score.logprob, tokens, logprobs)

    def _end(self, name: str) -> None:
        del self._open[name]
        self._scheduler.end(name)

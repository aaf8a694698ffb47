"""What is done next: rank 0 decides it for all ranks. No MLX.

The rules:

- A request is admitted in the order of arrival when what it needs now fits beside the
  others: its whole prompt. What the prefix cache holds of it is not read again.
- Decoding goes on in every pass. Prompts are read beside it: for a second at once where
  reading has not held up the rows lately, which is enough for short ones, and then in
  parts that add a little more than half to each pass; where more prompts are read than
  rows decode, so many times as much. Where nothing decodes, parts are as long as the
  option admits.
- Of several prompts that wait to be read, the shortest and the oldest take turns.
- Rows draft in the memory that all this leaves, as many tokens as pay.
- When memory gets short the prefix cache gives way first; then the request that was
  admitted last is set back. It is read again later, and its tokens are the same.
"""

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlxtp.generation.capacity import Capacity
from mlxtp.generation.draft_lengths import DraftLengths
from mlxtp.generation.pace import Pace
from mlxtp.generation.pays import MOST
from mlxtp.generation.prefix_cache import PrefixIndex, in_common
from mlxtp.generation.step import Admission, GenerationRequest, Step

# Prompts that are read at the same time: each has caches of its own.
READERS = 8

# A prompt waits for one that is being read if it has so many tokens in common with it.
COMMON_TOKENS = 64


@dataclass
class _Active:
    """A request that is read or decodes."""

    request: GenerationRequest
    number: int  # in the order of arrival
    tokens: list[int]  # all that are known
    done: int = 0  # tokens that its caches hold, while it is read
    decodes: bool = False
    boundaries: list[int] = field(default_factory=list)
    # While it waits: how many tokens it has in common with one that is read, by number.
    in_common: dict[int, int] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """How many tokens of the prompt are to be read."""
        return len(self.tokens) - 1 - self.done


class Scheduler:
    """Decides steps, from requests, memory, and how long passes take.

    Args:
        capacity: what caches take and may take on every rank.
        prefixes: which prompts the prefix cache holds.
        concurrency: the most requests that are read or decode at once.
        part: the most tokens of a prompt that are read in a pass.
        logits_part: the same where the logits of a prompt are wanted.
        trimmable_below: caches of fewer tokens can be taken back to any length.
        draft_lengths: how many tokens rows draft; None where nothing is drafted.
        context: the most tokens of a request.
    """

    def __init__(
        self,
        capacity: Capacity,
        prefixes: PrefixIndex,
        *,
        concurrency: int = 32,
        part: int = 512,
        logits_part: int = 64,
        trimmable_below: float = float("inf"),
        draft_lengths: DraftLengths | None = None,
        context: float = float("inf"),
    ) -> None:
        self.preemptions = 0
        self.looked_up_tokens = 0
        self.found_tokens = 0
        self.pace = Pace()
        self.draft_lengths = draft_lengths
        self._capacity = capacity
        self._prefixes = prefixes
        self._concurrency = concurrency
        self._part, self._logits_part = part, logits_part
        self._trimmable_below = trimmable_below
        self._context = context
        self._width = 0  # tokens of each row that the last pass has read, with drafts
        self._is_read_beside = False
        self._waiting: deque[_Active] = deque()
        self._active: dict[str, _Active] = {}  # in the order of admission
        self._ended: list[_Active] = []  # to be dropped in the next step
        self._longest_gone = 0  # tokens of the rows that are dropped in this step
        self._numbers = itertools.count()
        self._turns = itertools.cycle((True, False))

    @property
    def waiting(self) -> int:
        """How many requests are not admitted yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests are read or decode."""
        return len(self._active)

    @property
    def use(self) -> float:
        """The part of the limit that caches take on the fullest rank."""
        return self._capacity.fullest(*self._lengths(0), self._prefixes.nbytes)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to be done."""
        return not (self._waiting or self._active or self._ended)

    def submit(self, request: GenerationRequest) -> None:
        """Take a request."""
        active = _Active(request, next(self._numbers), list(request.tokens))
        self._waiting.append(active)

    def end(self, name: str) -> None:
        """Let a request go: it has ended, or nobody waits for it any more."""
        active = self._active.pop(name, None)
        if active is not None:
            self._ended.append(active)
        self._waiting = deque(x for x in self._waiting if x.request.id != name)

    def forget(self, name: str) -> None:
        """Note that the ranks have forgotten a request by themselves."""
        self._active.pop(name, None)

    def add(self, name: str, token: int) -> None:
        """Note a token that a request has got."""
        if name in self._active:
            self._active[name].tokens.append(token)

    def passed(
        self,
        seconds: float | None,
        width: int = 0,
        drafted: Mapping[str, tuple[int, int]] | None = None,
        draft_seconds: float = 0.0,
    ) -> None:
        """Note what the step that was decided last has come to.

        Args:
            seconds: from the pass before; None behind a time without passes, or where
                drafters read prompts.
            width: `generation.engine.Result`'s, and so are the others.
            drafted: see `width`.
            draft_seconds: see `width`.
        """
        self._width = width
        if seconds is not None:
            self.pace.passed(seconds, is_waited_for=width > 0)
        if self.draft_lengths is not None:
            self.draft_lengths.passed(
                seconds,
                self.pace.rows,
                width,
                drafted or {},
                draft_seconds,
                is_alone=not self._is_read_beside,
            )

    @property
    def _lacking(self) -> int:
        """How many of the known tokens of each row its caches lack: the last one."""
        return 1 if self._width else 0

    def decide(self) -> Step:
        """Decide the next step."""
        keep, drop, forget = self._let_go()
        join = self._begin_decoding(keep, forget)
        set_back = self._make_room(join, forget)
        drop += set_back
        join = [name for name in join if name not in set_back]
        admit = self._admit(forget)
        read = self._read()
        read_tokens = sum(count for _, count in read)
        self._is_read_beside = bool(read)
        self.pace.begin(read_tokens, self._decoding(), self._reading())
        # What goes at once, and nobody takes, is not put there.
        taken = {admission.key for admission in admit}
        unmade = {key for _, key in keep} & {*forget} - taken
        return Step(
            keep=tuple((name, key) for name, key in keep if key not in unmade),
            drop=tuple(drop),
            forget=tuple(key for key in forget if key not in unmade),
            admit=tuple(admit),
            join=tuple(join),
            draft=tuple(self._draft().items()),
            read=tuple(read),
        )

    def _let_go(self) -> tuple[list[tuple[str, int]], list[str], list[int]]:
        """Drop what has ended; the prefix cache keeps what was computed for it."""
        keep: list[tuple[str, int]] = []
        forget: list[int] = []
        drop = [active.request.id for active in self._ended]
        self._longest_gone = 0
        for active in self._ended:
            self._keep(active, keep, forget)
        gone = (len(active.tokens) for active in self._ended if active.decodes)
        self._longest_gone = max(gone, default=0)
        self._ended = []
        return keep, drop, forget

    def _keep(
        self, active: _Active, keep: list[tuple[str, int]], forget: list[int]
    ) -> None:
        held = len(active.tokens) - self._lacking if active.decodes else active.done
        tokens = active.tokens[:held]
        if not tokens:
            return
        added = self._prefixes.add(tokens, len(tokens) < self._trimmable_below)
        forget += added.dropped
        if added.key is None:
            return
        keep.append((active.request.id, added.key))
        # One of several rows is copied, and the rows go afterwards.
        if active.decodes and len(self._lengths(1)[0]) > 1:
            while not self._fits() and (freed := self._prefixes.free(1)):
                forget += freed

    def _begin_decoding(
        self, keep: list[tuple[str, int]], forget: list[int]
    ) -> list[str]:
        """Let requests decode whose prompts are read."""
        join = []
        for active in self._active.values():
            if active.decodes:
                continue
            at_boundary = active.done > 0 and active.done in active.boundaries
            if at_boundary:
                active.boundaries.remove(active.done)
            is_read = active.left == 0
            if at_boundary or (is_read and self._is_awaited(active)):
                self._keep(active, keep, forget)
            if is_read and active.request.settings.max_tokens != 0:
                active.decodes = True
                join.append(active.request.id)
        return join

    def _is_awaited(self, active: _Active) -> bool:
        """Whether a request that waits has much of its prompt in common with this."""
        return any(
            begin_alike(active.tokens, other.tokens)
            for other in itertools.islice(self._waiting, self._concurrency)
        )

    def _make_room(self, join: Sequence[str], forget: list[int]) -> list[str]:
        """See that the next pass fits in memory; return who is set back for it."""
        set_back: list[str] = []
        while not self._fits():
            freed = self._prefixes.free(1)
            forget += freed
            if freed:
                continue
            if len(self._active) == 1:
                break  # one alone fits: its context is limited so
            youngest = max(self._active.values(), key=lambda active: active.number)
            name = youngest.request.id
            if youngest.decodes and name not in join:
                self._longest_gone = max(self._longest_gone, len(youngest.tokens))
            self._set_back(youngest)
            set_back.append(name)
        return set_back

    def _set_back(self, active: _Active) -> None:
        request = active.request
        del self._active[request.id]
        self.preemptions += 1
        again = GenerationRequest(
            request.id,
            tuple(active.tokens),
            request.prompt_length,
            request.settings,
            request.boundaries,
        )
        self._waiting.appendleft(_Active(again, active.number, list(again.tokens)))

    def _admit(self, forget: list[int]) -> list[Admission]:
        """Let requests begin that fit beside the others."""
        admit: list[Admission] = []
        for waiting in list(itertools.islice(self._waiting, self._concurrency)):
            if len(self._active) >= self._concurrency or self._reading() >= READERS:
                break
            if self._is_served_soon(waiting):
                continue
            if not self._has_room(waiting):
                break
            self._waiting.remove(waiting)
            admit.append(self._begin(waiting, forget))
        return admit

    def _begin(self, active: _Active, forget: list[int]) -> Admission:
        """Let a request begin that has room if the prefix cache gives way."""
        request, tokens = active.request, active.tokens
        match = None
        if request.settings.prompt_logprobs is None:
            self.looked_up_tokens += len(tokens)
            match = self._prefixes.find(tokens, at_most=len(tokens) - 1)
        # What was found is used, also where it goes then: it was used last.
        while not self._fits(len(tokens)) and (freed := self._prefixes.free(1)):
            forget += freed
        self._active[request.id] = active
        if match is not None:
            active.done = match.tokens
            self.found_tokens += match.tokens
        if len(tokens) >= self._trimmable_below:
            last = len(tokens) - 1
            inner = (x for x in request.boundaries if active.done < x < last)
            active.boundaries = list(inner)
        if match is None:
            return Admission(request)
        return Admission(request, match.key, match.tokens)

    def _is_served_soon(self, waiting: _Active) -> bool:
        """Whether a prompt that is being read will spare this one much of its reading.

        It has to be half of what is left of that one, besides what is known already.
        """
        if waiting.request.settings.prompt_logprobs is not None:
            return False
        # How much may be known where it still pays to wait.
        most_known = [
            self._in_common(active, waiting) - active.left / 2
            for active in self._active.values()
            if active.left > 0
            and not active.decodes
            and begin_alike(active.tokens, waiting.tokens)
            and len(active.tokens) < self._trimmable_below
        ]
        if max(most_known, default=-1) < 0:
            return False
        return self._prefixes.spares(waiting.tokens) <= max(most_known)

    def _in_common(self, active: _Active, waiting: _Active) -> int:
        """How many tokens of a prompt one that is read has in common with it."""
        if active.number not in waiting.in_common:
            common = in_common(active.tokens, waiting.tokens)
            waiting.in_common[active.number] = common
        return waiting.in_common[active.number]

    def _read(self) -> list[tuple[str, int]]:
        """Choose which prompts are read, and how many tokens of each."""
        left = self.pace.part(self._part) if self._decoding() else self._part
        read: list[tuple[str, int]] = []
        readers = [a for a in self._active.values() if not a.decodes and a.left > 0]
        readers.sort(key=lambda active: active.number)
        if next(self._turns):
            readers.sort(key=lambda active: active.left)
        for active in readers:
            count = min(active.left, left)
            if active.request.settings.prompt_logprobs is not None:
                count = min(count, self._logits_part)
            ahead = [x - active.done for x in active.boundaries if x > active.done]
            count = min(count, *ahead) if ahead else count
            read.append((active.request.id, count))
            active.done += count
            left -= count
            if left == 0:
                break
        return read

    def _draft(self) -> dict[str, int]:
        """Choose which rows draft, and how many tokens at most.

        A request has no more tokens than it asks for and the context has, and caches no
        more than there is room for: the pass makes all rows longer by its width.
        """
        if self.draft_lengths is None:
            return {}
        rows = [active for active in self._active.values() if active.decodes]
        room = {}
        for active in rows:
            most = active.request.settings.max_tokens
            last = self._context
            if most is not None:
                last = min(last, active.request.prompt_length + most)
            # Besides drafts a pass gives one token, and another one may be on its way.
            known = len(active.tokens) + 1 - self._lacking
            room[active.request.id] = int(min(max(last - known - 1, 0), MOST))
        chosen = self.draft_lengths.choose(room)
        while chosen and not self._fits(ahead=1 + max(chosen.values())):
            longest = max(chosen.values()) - 1
            chosen = {name: min(n, longest) for name, n in chosen.items() if longest}
        return chosen

    def _reading(self) -> int:
        return sum(not active.decodes for active in self._active.values())

    def _decoding(self) -> int:
        return sum(active.decodes for active in self._active.values())

    def _lengths(self, ahead: int) -> tuple[list[int], list[int]]:
        """Lengths of rows so many passes ahead, and of prompts when they are read.

        Rows stay filled up to the longest that has gone until they are written to.
        """
        there = [*self._active.values(), *self._ended]
        rows = [len(active.tokens) + ahead for active in there if active.decodes]
        rows[:1] = [max(length, self._longest_gone) for length in rows[:1]]
        return rows, [len(active.tokens) for active in there if not active.decodes]

    def _has_room(self, waiting: _Active) -> bool:
        """Whether a prompt has room if the prefix cache gives way.

        While it is read, and when all that are read have joined the rows: else it would
        be set back at once.
        """
        if not self._active:
            return True  # as its context is limited
        tokens = len(waiting.tokens)
        rows, others = self._lengths(1)
        joined = [*rows, *(length + 1 for length in (*others, tokens))]
        is_read = self._capacity.fits(rows, [*others, tokens])
        return is_read and self._capacity.fits(joined, [])

    def _fits(self, *more: int, ahead: int = 1) -> bool:
        """Whether the next pass has room, with prompts of so many tokens besides.

        It reads `ahead` tokens of each row, one of which may be on its way.
        """
        rows, others = self._lengths(ahead)
        kept, width = self._prefixes.nbytes, max(ahead, self._width)
        return self._capacity.fits(rows, [*others, *more], kept, width)


def begin_alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two prompts have their first `COMMON_TOKENS` tokens in common."""
    return len(a) >= COMMON_TOKENS and a[:COMMON_TOKENS] == b[:COMMON_TOKENS]

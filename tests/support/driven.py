"""An engine with its scheduler, driven by a test as rank 0 of a server drives them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxtp import Communicator
from mlxtp.generation.batching import reason_against_batches
from mlxtp.generation.capacity import CacheBytes, Capacity, RankCapacity
from mlxtp.generation.draft_lengths import DraftLengths
from mlxtp.generation.drawing import Score
from mlxtp.generation.engine import Drawn, Engine, Result
from mlxtp.generation.prefix_cache import PrefixIndex, PrefixStore, trimmable_below
from mlxtp.generation.scheduler import Scheduler
from mlxtp.generation.settings import Settings
from mlxtp.generation.step import GenerationRequest, Step

GREEDY = Settings(max_tokens=8, seed=0, temperature=0.0)


class Driven:
    """An engine on all ranks; rank 0's scheduler decides its steps.

    `steps` are those that were made, `results` what they gave, `drawn` what each
    request has got.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        part: int = 37,
        limit_bytes: int = 1 << 40,
        prefix_bytes: int = 1 << 30,
        concurrency: int = 8,
        grammars: Any = None,
        draft_lengths: DraftLengths | None = None,
        **options: Any,
    ) -> None:
        of_ranks = comm.allgather_object(CacheBytes.of(model))
        self.capacity = Capacity(
            tuple(RankCapacity("a host", cache, limit_bytes) for cache in of_ranks),
            part,
        )
        self.comm = comm
        self.index = PrefixIndex(self.capacity.bytes_of, prefix_bytes)
        self.store = PrefixStore()
        self.engine = Engine(
            model, self.store, grammars, model.slice_table.vocabulary_rows, **options
        )
        self.is_batched = reason_against_batches(model) is None
        self.scheduler = Scheduler(
            self.capacity,
            self.index,
            concurrency=concurrency if self.is_batched else 1,
            part=part,
            trimmable_below=trimmable_below(make_prompt_cache(model)),
            draft_lengths=draft_lengths,
        )
        self.steps: list[Step] = []
        self.results: list[Result] = []
        self.drawn: dict[str, list[Drawn]] = {}
        self.scores: dict[str, list[Score] | None] = {}
        self.errors: dict[str, str] = {}
        self._requests: dict[str, GenerationRequest] = {}

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        settings: Settings = GREEDY,
        boundaries: Iterable[int] = (),
        **changes: Any,
    ) -> None:
        """Hand in a request, on all ranks."""
        request = GenerationRequest(
            name,
            tuple(prompt),
            len(prompt),
            replace(settings, **changes),
            tuple(boundaries),
        )
        self.take(request)

    def take(self, request: GenerationRequest) -> None:
        """Hand in a request that may have tokens already, on all ranks."""
        self._requests[request.id] = request
        self.drawn[request.id] = []
        self.scheduler.submit(request)

    def pass_(self) -> bool:
        """Make one pass; return whether there was something to do."""
        step = None
        if self.comm.rank == 0:
            is_idle = self.scheduler.is_idle
            step = Step(is_idle=True) if is_idle else self.scheduler.decide()
        step = self.comm.announce(step)
        if step.is_idle:
            return False
        self.steps.append(step)
        result = self.engine.run(step)
        self.results.append(result)
        self.scheduler.passed(None, result.width, result.drafted, result.draft_seconds)
        for name, several in result.drawn.items():
            for drawn in several:
                self.scheduler.add(name, drawn.token)
            request = self._requests[name]
            given = len(request.tokens) - request.prompt_length
            tokens, most = self.drawn[name], request.settings.max_tokens
            for drawn in several:
                if most is None or given + len(tokens) < most:
                    tokens.append(drawn)
            if given + len(tokens) == most:
                self.scheduler.end(name)
        for name, scores in result.read.items():
            self.scores[name] = scores
            if self._requests[name].settings.max_tokens == 0:
                self.scheduler.end(name)
        for name, words in (*result.refused.items(), *result.stuck.items()):
            self.errors[name] = words
        for name in result.refused:
            self.scheduler.forget(name)
        for name in result.stuck:
            self.scheduler.end(name)
        return True

    def run(self) -> Mapping[str, list[int]]:
        """Make passes until nothing is to be done; return all tokens so far."""
        while self.pass_():
            assert len(self.steps) < 10_000, "it does not come to an end"
        return self.tokens

    def run_short(
        self, plain: "Driven", prompts: Mapping[str, Sequence[int]], **settings: Any
    ) -> None:
        """Hand in prompts one a pass, and run; memory has been made short for them.

        They get what they got from `plain`, which has memory enough, though some are
        set back.
        """
        for name, prompt in prompts.items():
            self.submit(name, prompt, **settings)
            self.pass_()
        uses = []
        while self.pass_():
            uses.append(self.scheduler.use if self.comm.rank == 0 else 0.0)
        assert self.tokens == plain.tokens
        assert max(uses) <= 1
        assert self.comm.rank or self.scheduler.preemptions > 0

    @property
    def texts(self) -> list[list[int]]:
        """Each request's prompt with its tokens, those that it came with as well."""
        requests = self._requests.items()
        return [[*x.tokens, *self.tokens[name]] for name, x in requests]

    @property
    def tokens(self) -> dict[str, list[int]]:
        """The tokens of each request."""
        return {
            name: [drawn.token for drawn in tokens]
            for name, tokens in self.drawn.items()
        }

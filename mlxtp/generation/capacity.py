"""What caches take on each rank, and what they may take."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.cluster.memory import available_bytes
from mlxtp.cluster.units import gigabytes
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.dryrun.caches import CONTEXT_STEP, cache_arrays
from mlxtp.dryrun.requirements import SCORES_AT_ONCE, need
from mlxtp.families.blocks import Heads
from mlxtp.generation.rows import leaves
from mlxtp.model.skeleton import EmptyModel

# Arrays that MLX computes side by side when batches are merged, extended or filtered:
# of so many the old and the new are there at once (the width of its evaluation).
COPIED_AT_ONCE = 20
# Arrays of V float32 that the drawing of a row's token has at once: logits,
# log-probabilities, their order, and what processors make of them.
SAMPLING_AT_ONCE = 6
# Of what a host has free, this part is left: for MLX's cache of buffers, for the
# system, and for what the estimates miss.
RESERVE = 0.1
# A model that has no room for so many tokens is of no use.
SHORTEST = 256


@dataclass(frozen=True)
class Growth:
    """Caches that take `token_bytes` for each token.

    With a `window` they hold that many tokens, and those of a prompt that are read in a
    pass besides. One `in_chunks` (mlx-lm's ChunkedKVCache) has room for a step more.
    """

    token_bytes: float
    window: int | None = None
    in_chunks: bool = False

    def room(self, tokens: int, part: int) -> int:
        """The most tokens that there is room for when `tokens` have been read."""
        if self.window is None:
            return tokens + CONTEXT_STEP - 1
        beyond = part + CONTEXT_STEP - 1 if self.in_chunks else part - 1
        return min(tokens + CONTEXT_STEP - 1, self.window + beyond)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's caches on a rank, at most.

    Args:
        fixed: those of states.
        growths: those that grow, each of a different kind.
        arrays: how many arrays there are.
        plain: the same before they are quantized, from `quantized_start` tokens on.
        quantized_start: see `plain`.
    """

    fixed: int
    growths: tuple[Growth, ...]
    arrays: int
    plain: "CacheBytes | None" = None
    quantized_start: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> "CacheBytes":
        """Find what the caches of this rank take, by a dry run of the split `model`.

        Communicates: nothing.
        """
        return _bytes_of(cache_arrays(model), model)

    @classmethod
    def quantized(
        cls, model: nn.Module, bits: int, group_size: int, start: int
    ) -> "CacheBytes":
        """Find it for caches that mlx-lm quantizes once they have `start` tokens."""
        plain = cls.of(model)
        packed = [
            cache.to_quantized(group_size, bits) if type(cache) is KVCache else cache
            for cache in cache_arrays(model)
        ]
        result = _bytes_of(packed, model)
        return cls(result.fixed, result.growths, result.arrays, plain, start)

    def bytes(self, tokens: int, part: int = 1) -> int:
        """Bytes when `tokens` have been read, the last `part` of them at once.

        mlx-lm makes room in steps of 256 tokens, which begin where a pass began: what
        there is may be less by up to 255 tokens, never more.
        """
        if tokens == 0:
            return 0
        growing = sum(g.token_bytes * g.room(tokens, part) for g in self.growths)
        result = self.fixed + round(growing)
        if self.plain is None:
            return result
        before = min(tokens, self.quantized_start + part)
        return max(result, self.plain.bytes(before, part))

    def batch_bytes(self, rows: int, longest: int, width: int = 1) -> int:
        """Bytes of a batch: all rows are filled up to the longest.

        `width` is how many tokens of each the last pass has read.
        """
        return rows * self.bytes(longest, width)

    def point_bytes(self, tokens: int) -> int:
        """Bytes of what a `Point` keeps: states and windows as they were."""
        windows = (g for g in self.growths if g.window is not None and not g.in_chunks)
        return self.fixed + round(
            sum(g.token_bytes * g.room(tokens, 1) for g in windows)
        )

    @property
    def copied(self) -> float:
        """Which part of caches is there twice while they are copied."""
        return min(1.0, COPIED_AT_ONCE / max(1, self.arrays))


@dataclass(frozen=True)
class RankCapacity:
    """What caches take on one rank, and the most that they may.

    `score_bytes` is what the products of queries and keys take for each token of the
    longest sequence, where attention is not one kernel. `draft` is what the caches of a
    draft model take on this rank, which has those of each row besides, and a `Point` of
    each.
    """

    host: str
    cache: CacheBytes
    limit_bytes: int
    score_bytes: float = 0.0
    draft: CacheBytes | None = None

    def used_bytes(
        self,
        rows: Sequence[int],
        others: Sequence[int],
        kept_bytes: int,
        part: int,
        width: int = 1,
    ) -> int:
        """Bytes at the worst moment of a pass; arguments are `Capacity.fits`'s."""
        if not rows and not others:
            return kept_bytes
        batch = self.cache.batch_bytes(len(rows), max(rows, default=0), width)
        single = [self.cache.bytes(tokens, part) for tokens in others]
        # What grows, or comes or goes in a batch, is copied.
        copied = self.cache.copied * max(batch, *single, 0)
        scores = self.score_bytes * max(*rows, *others, 0)
        draft = self.draft
        drafts = sum(draft.bytes(x) + draft.point_bytes(x) for x in rows if draft)
        return kept_bytes + batch + sum(single) + round(copied + scores) + drafts


@dataclass(frozen=True)
class Capacity:
    """What caches take on every rank and what they may: the same value on all ranks.

    `part` is the most tokens of a prompt that are read in a pass.
    """

    ranks: tuple[RankCapacity, ...]
    part: int

    def bytes_of(self, tokens: int) -> tuple[int, ...]:
        """Bytes of one sequence's caches on each rank."""
        return tuple(rank.cache.bytes(tokens, self.part) for rank in self.ranks)

    def fullest(
        self,
        rows: Sequence[int],
        others: Sequence[int],
        kept_bytes: Sequence[int] = (),
        width: int = 1,
    ) -> float:
        """The part of the limit that is used on the fullest rank, 0 to 1; above 1 none.

        Arguments are those of `fits`.
        """
        kept = kept_bytes or [0] * len(self.ranks)
        return max(
            rank.used_bytes(rows, others, of_rank, self.part, width) / rank.limit_bytes
            for rank, of_rank in zip(self.ranks, kept, strict=True)
        )

    def fits(
        self,
        rows: Sequence[int],
        others: Sequence[int],
        kept_bytes: Sequence[int] = (),
        width: int = 1,
    ) -> bool:
        """Whether caches have room on every rank.

        Args:
            rows: tokens of each sequence of the batch that decodes. One that has left
                since the last pass counts for one more: the others lie filled up to
                it until they are written to.
            others: tokens of each sequence that has caches of its own, as when its
                prompt is read.
            kept_bytes: what the prefix cache holds, on each rank.
            width: tokens of each row that a pass reads, of which windows hold more.
        """
        return self.fullest(rows, others, kept_bytes, width) <= 1

    def longest(self, context: int) -> int:
        """The most tokens that one sequence can have, up to `context`."""

        def is_too_long(tokens: int) -> bool:
            return not (self.fits([tokens], []) and self.fits([], [tokens]))

        return bisect_left(range(1, context + 1), True, key=is_too_long)


def measure(
    model: nn.Module,
    comm: Communicator,
    build: Callable[[], EmptyModel],
    *,
    kv_gb: float | None = None,
    part: int = 512,
    rows: int = 32,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    draft: nn.Module | None = None,
) -> Capacity:
    """Say what caches take and may take, now that the model is loaded.

    They may take what each host has free, less what passes need besides and a reserve;
    ranks on one host share it in proportion to what their caches take.

    Args:
        model: the split model.
        comm: its ranks.
        build: makes the model without weights, as it was loaded, for a dry run.
        kv_gb: the limit in GB, on the rank whose caches take most.
        part: the most tokens of a prompt that are read in a pass.
        rows: the most tokens that are drawn in a pass, drafts of all rows among them.
        kv_bits: how caches are quantized, as mlx-lm has it; None for not.
        kv_group_size: mlx-lm's.
        quantized_kv_start: mlx-lm's.
        draft: what this rank has of a draft model, which has caches for each row too.

    Raises: UsageError, with the numbers, if `kv_gb` is not there or is not enough, and
        if caches cannot be quantized so.
    Communicates: two allgathers of objects.
    """
    mx.clear_cache()
    is_fused = gpu_limit_bytes() is not None and kv_bits is None
    with comm.agreement():
        cache = (
            CacheBytes.of(model)
            if kv_bits is None
            else CacheBytes.quantized(model, kv_bits, kv_group_size, quantized_kv_start)
        )
        mine = _Facts(
            comm.host,
            cache,
            0.0 if is_fused else _score_bytes(model, comm.rank, part),
            _working_bytes(model, comm.rank, build, part, rows),
            available_bytes(gpu_limit_bytes()),
            # Metal's limit counts what is there already.
            mx.get_active_memory() if mx.metal.is_available() else 0,
            None if draft is None else CacheBytes.of(draft),
        )
    ranks: list[_Facts] = comm.allgather_object(mine)
    free = _free_bytes(ranks)
    limits = free
    if kv_gb is not None:
        largest = max(facts.typical_bytes for facts in ranks)
        limits = [round(kv_gb * 1e9 * facts.typical_bytes / largest) for facts in ranks]
        lacking = max(range(len(ranks)), key=lambda rank: limits[rank] - free[rank])
        if limits[lacking] > free[lacking]:
            raise UsageError(
                f"--kv-gb {kv_gb:g}: that is {gigabytes(limits[lacking])} GB on rank "
                f"{lacking}, and {ranks[lacking].host} has "
                f"{gigabytes(free[lacking])} GB for it beside the model"
            )
    capacity = Capacity(
        tuple(
            RankCapacity(facts.host, facts.cache, limit, facts.score_bytes, facts.draft)
            for facts, limit in zip(ranks, limits, strict=True)
        ),
        part,
    )
    if capacity.longest(SHORTEST) < SHORTEST:
        _refuse(capacity, kv_gb)
    return capacity


def _refuse(capacity: Capacity, kv_gb: float | None) -> NoReturn:
    """Say on which rank there is too little room.

    Raises: UsageError.
    """
    wanted = [
        rank.used_bytes([], [SHORTEST], 0, capacity.part) for rank in capacity.ranks
    ]
    lacking = [
        used - rank.limit_bytes
        for used, rank in zip(wanted, capacity.ranks, strict=True)
    ]
    number = lacking.index(max(lacking))
    rank = capacity.ranks[number]
    given = f"{rank.host} has" if kv_gb is None else f"--kv-gb {kv_gb:g} gives"
    raise UsageError(
        f"caches of {SHORTEST} tokens take {gigabytes(wanted[number])} GB on rank "
        f"{number}, and {given} {gigabytes(rank.limit_bytes)} GB for them beside the "
        "model: use more hosts, give this one a smaller share with --shares, or take "
        "fewer bits"
    )


@dataclass(frozen=True)
class _Facts:
    """What one rank tells the others.

    `available_bytes` are the host's, `held_bytes` what the rank has of them already.
    """

    host: str
    cache: CacheBytes
    score_bytes: float
    working_bytes: int
    available_bytes: int
    held_bytes: int
    draft: CacheBytes | None

    @property
    def typical_bytes(self) -> int:
        of_draft = self.draft.bytes(4096) if self.draft else 0
        return self.cache.bytes(4096) + of_draft


def _free_bytes(ranks: Sequence[_Facts]) -> list[int]:
    """What caches of each rank may take; 1 where nothing is left."""
    result = []
    for facts in ranks:
        here = [other for other in ranks if other.host == facts.host]
        free = min(other.available_bytes for other in here)
        free -= sum(other.held_bytes for other in here)
        free -= round(RESERVE * max(0, free))
        free -= sum(other.working_bytes for other in here)
        share = facts.typical_bytes / sum(other.typical_bytes for other in here)
        result.append(max(1, round(free * share)))
    return result


def _working_bytes(
    model: nn.Module, rank: int, build: Callable[[], EmptyModel], part: int, rows: int
) -> int:
    """What a rank needs in a pass, beside weights, caches and scores."""
    table = model.slice_table
    read = need(build(), table, rank, part + 1).working_bytes
    decode = need(build(), table, rank, 2, batch=rows).working_bytes
    sampling = SAMPLING_AT_ONCE * 4 * rows * table.vocabulary_rows
    return max(read, decode) + sampling


def _score_bytes(model: nn.Module, rank: int, part: int) -> float:
    """What the products of `part` queries with one key of all heads take."""
    heads = [
        shards.parts[rank].slots("q")
        for shards in model.slice_table.blocks
        if isinstance(shards.block.rule, Heads)
    ]
    sizes = [array.dtype.size for cache in cache_arrays(model) for array in _in(cache)]
    return SCORES_AT_ONCE * max(heads, default=0) * part * max(sizes, default=0)


def _bytes_of(caches: list[Any], model: nn.Module) -> CacheBytes:
    """Read off caches, of a few tokens, what they take of any number."""
    fixed, arrays = 0.0, 0
    growths: dict[tuple[int | None, bool], float] = {}
    for place, cache in enumerate(leaves(caches)):
        own = list(_in(cache))
        arrays += len(own)
        kind: tuple[int | None, bool] = (None, False)
        token_bytes = 0.0
        if isinstance(cache, ArraysCache):
            fixed += cache.nbytes
        elif isinstance(
            cache, KVCache | QuantizedKVCache | RotatingKVCache | ChunkedKVCache
        ):
            token_bytes = sum(x.nbytes / x.shape[2] for x in own)
            if isinstance(cache, RotatingKVCache):
                kind = (cache.max_size, False)
            elif isinstance(cache, ChunkedKVCache):
                kind = (cache.chunk_size, True)
        else:  # a class of the model's own: as it grows now, without end
            later = [*leaves(cache_arrays(model, tokens=8 + CONTEXT_STEP))][place]
            token_bytes = (later.nbytes - cache.nbytes) / CONTEXT_STEP
            fixed += cache.nbytes
        growths[kind] = growths.get(kind, 0.0) + token_bytes
    return CacheBytes(
        round(fixed),
        tuple(Growth(x, *kind) for kind, x in growths.items() if x),
        arrays,
    )


def _in(cache: Any) -> Iterator[mx.array]:
    """The arrays that a cache holds."""
    for value in vars(cache).values():
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, mx.array):
                yield x

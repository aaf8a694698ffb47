"""What each rank needs of memory, and what it owns: from the slice table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mlxtp.dryrun.passes import CHUNK_TOKENS, DryRun, RankRuns, Step, chunks
from mlxtp.families.blocks import Heads, Width
from mlxtp.model.skeleton import EmptyModel
from mlxtp.partition.shares import Share
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

# How much of the outputs between two collectives is alive at once, with what lies
# between them: measured (tests/plan/test_plan_fits.py).
OUTPUTS_AT_ONCE = 1.5
# The same for the products of all queries and keys, where attention is not one kernel.
SCORES_AT_ONCE = 1.2
# A part of an allreduce is in memory as it was sent, received and summed.
PARTS_AT_ONCE = 3
# What MLX and its libraries take on their own, measured too, without PyTorch: mlx-lm
# imports it where it is installed.
BASE_BYTES = 15_000_000


@dataclass(frozen=True)
class Owned:
    """What a rank owns of a model.

    Pairs are (least, most) of any layer, 0 where no layer has it. `columns` are those
    of dense MLPs, `expert_columns` those of each of the `experts`.
    """

    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    experts: int
    expert_columns: tuple[int, int]
    vocabulary_rows: int


@dataclass(frozen=True)
class Need:
    """What a rank owns, computes, and needs of memory.

    `batch` are the sequences at once, `query_heads` those of all layers together;
    `score_bytes` is what the products of queries and keys take, where attention is not
    one kernel. The longest chunk of the prompt has `longest_chunk` times as many tokens
    as the last, which the dry run has.
    """

    rank: int
    owned: Owned
    dry_run: DryRun
    batch: int
    query_heads: int
    score_bytes: int
    longest_chunk: float

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights: exact."""
        return self.dry_run.held_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of caches with the whole context in them: exact."""
        return self.dry_run.cache_bytes

    @property
    def working_bytes(self) -> int:
        """Bytes of everything else at the worst moment: estimated."""
        steps = map(_working_bytes, self.dry_run.chunk)
        chunk = self.longest_chunk * max(steps, default=0)
        token = max(map(_working_bytes, self.dry_run.token))
        return BASE_BYTES + max(round(chunk), token) + self.score_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all three."""
        return self.weights_bytes + self.cache_bytes + self.working_bytes


def _working_bytes(step: Step) -> int:
    return round(OUTPUTS_AT_ONCE * step.output_bytes) + PARTS_AT_ONCE * step.part_bytes


class WorldNeeds:
    """What each of the ranks needs that share a model, for whatever contexts.

    Args:
        build: makes the model without weights, a new one in each call.
        shares: one positive number or `Share` a rank.
        batch: sequences at once.
        is_fused: attention is one kernel, as on a GPU; else its scores take memory.

    Raises: ValueError if it is no model, or cannot be split so.
    """

    def __init__(
        self,
        build: Callable[[], EmptyModel],
        shares: Iterable[int | Share],
        batch: int = 1,
        *,
        is_fused: bool = True,
    ) -> None:
        self._table = table = slice_table(build().model, shares)
        # Ranks with slices of the same shapes and as many zeros compute alike.
        self._shapes = [
            (
                tuple(part.shape for part in table.slices(rank).values()),
                tuple(sum(s.parts[rank].zeros) for s in table.blocks if s.parts),
            )
            for rank in range(table.ranks)
        ]
        self._by_shapes = {
            shapes: RankNeeds(
                build(), table, self._shapes.index(shapes), batch, is_fused=is_fused
            )
            for shapes in dict.fromkeys(self._shapes)
        }

    def at(self, context: int) -> list[Need]:
        """Return the need of each rank with so many tokens in the caches."""
        needs = {shapes: rank.at(context) for shapes, rank in self._by_shapes.items()}
        return [
            replace(needs[shapes], rank=rank, owned=owned(self._table, rank))
            for rank, shapes in enumerate(self._shapes)
        ]


class RankNeeds:
    """What one rank of a table needs, for whatever contexts.

    `empty` becomes that rank's model. Arguments are those of `WorldNeeds`.
    """

    def __init__(
        self,
        empty: EmptyModel,
        table: SliceTable,
        rank: int,
        batch: int = 1,
        *,
        is_fused: bool = True,
    ) -> None:
        self._runs = RankRuns(empty, table, rank, batch=batch)
        self._rank, self._batch, self._is_fused = rank, batch, is_fused
        self._owned = owned(table, rank)
        self._heads = sum(
            shards.parts[rank].slots("q")
            for shards in table.blocks
            if isinstance(shards.block.rule, Heads)
        )

    def at(self, context: int) -> Need:
        """Return what it needs with so many tokens in the caches."""
        run, heads = self._runs.at(context), self._heads
        scores = 0.0
        caches = [cache for cache in run.caches if cache.width]
        if caches and not self._is_fused:
            tokens = min(max(cache.tokens for cache in caches), context)
            scores = SCORES_AT_ONCE * self._batch * heads / len(caches)
            scores *= min(CHUNK_TOKENS, context) * tokens * run.item_bytes
        *_, last = chunks(context - 1)
        longest = min(CHUNK_TOKENS, context - 1) / max(last, 1)
        return Need(
            *(self._rank, self._owned, run, self._batch, heads),
            *(round(scores), longest),
        )


def needs(
    build: Callable[[], EmptyModel],
    shares: Iterable[int | Share],
    context: int,
    batch: int = 1,
    *,
    is_fused: bool = True,
) -> list[Need]:
    """Say what each of the ranks needs with `context` tokens, as `WorldNeeds` does."""
    return WorldNeeds(build, shares, batch, is_fused=is_fused).at(context)


def need(
    empty: EmptyModel,
    table: SliceTable,
    rank: int,
    context: int,
    batch: int = 1,
    *,
    is_fused: bool = True,
) -> Need:
    """Say what one rank needs with `context` tokens, as `RankNeeds` does."""
    return RankNeeds(empty, table, rank, batch, is_fused=is_fused).at(context)


def owned(table: SliceTable, rank: int) -> Owned:
    """Say what `rank` owns, as the slice table has it."""
    queries, kv, columns, expert_columns = [], [], [], []
    experts, vocabulary_rows = [0], [0]
    for shards in table.blocks:
        if isinstance(shards.block.rule, Heads):
            queries.append(shards.parts[rank].size("q"))
            kv.append(shards.parts[rank].size("kv"))
        elif isinstance(shards.block.rule, Width):
            width = shards.parts[rank].size("w")
            shape = table.parameters.get(f"{shards.path}.{shards.block.rule.of}.weight")
            if shape is not None and len(shape) == 3:
                experts.append(shape[0])
                expert_columns.append(width)
            else:
                columns.append(width)
    for matrix in table.matrices.values():
        if matrix.cut.layout == "v":
            vocabulary_rows.append(matrix.spans[rank].length)
    return Owned(
        _range(queries),
        _range(kv),
        _range(columns),
        max(experts),
        _range(expert_columns),
        max(vocabulary_rows),
    )


def _range(counts: list[int]) -> tuple[int, int]:
    return (min(counts), max(counts)) if counts else (0, 0)

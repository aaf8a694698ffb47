"""What each rank needs of memory, and what it owns: from the slice table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxtp.dryrun.passes import PIECE, Rehearsed, Step, rehearse
from mlxtp.families.blocks import Heads, Width
from mlxtp.plan.opening import Opened
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

# Of what the layers between two collectives give out together, what is there at once,
# with what lies between them: measured (tests/plan/test_plan_fits.py).
MADE_AT_ONCE = 1.5
# Where attention is not one kernel: of the products of all queries and keys, likewise.
SCORES_AT_ONCE = 1.2
# A part of an allreduce lies there as it was sent, received and summed.
PARTS_AT_ONCE = 3
# What MLX and its libraries take on their own, likewise, without PyTorch: where it is
# installed, mlx-lm imports it.
BASE_BYTES = 15_000_000


@dataclass(frozen=True)
class Owned:
    """What a rank owns, least and most of any layer; 0 where no layer has it."""

    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    experts: int
    expert_columns: tuple[int, int]
    words: int


@dataclass(frozen=True)
class Need:
    """What a rank owns, computes, and needs of memory."""

    rank: int
    owned: Owned
    rehearsed: Rehearsed
    query_heads: int  # of all layers
    score_bytes: int

    @property
    def weights_bytes(self) -> int:
        return self.rehearsed.held_bytes

    @property
    def cache_bytes(self) -> int:
        return self.rehearsed.cached_bytes

    @property
    def working_bytes(self) -> int:
        steps = (*self.rehearsed.piece, *self.rehearsed.token)
        return BASE_BYTES + max(map(_working, steps)) + self.score_bytes

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.working_bytes


def _working(step: Step) -> int:
    return round(MADE_AT_ONCE * step.made_bytes) + PARTS_AT_ONCE * step.part_bytes


def needs(
    opened: Opened,
    shares: Sequence[int],
    context: int,
    batch: int = 1,
    *,
    is_fused: bool = True,
) -> list[Need]:
    """What the ranks need that share a model in proportion to `shares`.

    Args:
        opened: the model.
        shares: one positive number a rank.
        context: tokens in the caches.
        batch: sequences at once.
        is_fused: attention is one kernel, as on a GPU; else its scores take memory.

    Raises: ValueError if it is no model, or cannot be split so.
    """
    table = slice_table(opened.build().model, shares)
    found: dict[object, Need] = {}
    for rank in range(len(shares)):
        # Ranks with slices of the same shapes compute alike.
        shapes = tuple(it.shape for it in table.slices(rank).values())
        if shapes not in found:
            found[shapes] = need(opened, table, rank, context, batch, is_fused)
        found[rank] = replace(found[shapes], rank=rank, owned=owned(table, rank))
    return [found[rank] for rank in range(len(shares))]


def need(
    opened: Opened,
    table: SliceTable,
    rank: int,
    context: int,
    batch: int = 1,
    is_fused: bool = True,
) -> Need:
    """What one rank of a table needs."""
    rehearsed = rehearse(opened.build(), table, rank, batch, context)
    heads = sum(
        shards.parts[rank].size("q")
        for shards in table.blocks
        if isinstance(shards.block.rule, Heads)
    )
    scores = 0.0
    caches = [cache for cache in rehearsed.caches if cache.width]
    if caches and not is_fused:
        tokens = min(max(cache.tokens for cache in caches), context)
        scores = SCORES_AT_ONCE * batch * heads / len(caches)
        scores *= min(PIECE, context) * tokens * rehearsed.item_bytes
    return Need(rank, owned(table, rank), rehearsed, heads, round(scores))


def owned(table: SliceTable, rank: int) -> Owned:
    queries, kv, columns, expert_columns, words, experts = [], [], [], [], [0], [0]
    for shards in table.blocks:
        if isinstance(shards.block.rule, Heads):
            queries.append(shards.parts[rank].size("q"))
            kv.append(shards.parts[rank].size("kv"))
        elif isinstance(shards.block.rule, Width):
            width = shards.parts[rank].size("w")
            shape = table.parameters.get(f"{shards.path}.{shards.block.rule.of}.share")
            if shape is not None and len(shape) == 3:
                experts.append(shape[0])
                expert_columns.append(width)
            else:
                columns.append(width)
    for matrix in table.matrices.values():
        if matrix.cut.layout == "v":
            words.append(matrix.spans[rank].length)
    return Owned(
        _range(queries),
        _range(kv),
        _range(columns),
        max(experts),
        _range(expert_columns),
        max(words),
    )


def _range(counts: list[int]) -> tuple[int, int]:
    return (min(counts), max(counts)) if counts else (0, 0)

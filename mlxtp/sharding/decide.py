"""The slice table: which slice of which parameter is whose.

`slice_table` is the one place that decides it: table of families x empty model x
shares of the ranks -> the slices of every rank. It needs no weight and no other rank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtp import families
from mlxtp.families import Block, Cut, Family
from mlxtp.families.blocks import (
    BlockShards,
    Heads,
    Width,
    base,
    blocks_of,
    child,
    targets,
)
from mlxtp.partition.heads import HeadShard, head_shards, tiled
from mlxtp.partition.layouts import Fill, Part, fill, place
from mlxtp.partition.shares import Share, Shares, cut_axis
from mlxtp.partition.spans import Span, Spans
from mlxtp.sharding.table import MatrixShards, SliceTable

# The most that a rank's share of an MLP may be above an even one before quantization
# groups are cut in two, and are then held on both sides of the cut.
UNEVEN = Fraction(6, 5)


def slice_table(model: nn.Module, shares: Iterable[int | Share]) -> SliceTable:
    """Decide what every rank owns of `model`, whose arrays are not looked into.

    Args:
        model: a whole model of mlx-lm, with or without LoRA layers.
        shares: one positive number or `Share` a rank, in whose proportion it gets
            work.

    Raises: ValueError if the model cannot be split so.
    """
    shares = Shares(shares)
    family, remark = families.of(model)
    places = list(_blocks(model, family))
    summed_whole = [path for path, _, block in places if block.sums != "rows"]
    containers = {
        path
        for path in summed_whole
        if not _inside(path, (other for other in summed_whole if other != path))
    }
    blocks, matrices = [], {}
    for path, module, block in places:
        shards = _shard_block(path, module, block, model, shares)
        blocks.append(shards)
        for name, target, cut in targets(module, block):
            where = f"{path}.{name}" if path else name
            summed = cut.inner or not _inside(f"{where}.", containers)
            matrices[where] = _shard_matrix(
                where, module, target, cut, shards, summed, shares
            )
    outputs = {
        shards.path: shards
        for shards in blocks
        if shards.path in containers and shards.block.sums == "output"
    }
    parameters = tree_flatten(model.parameters())
    return SliceTable(
        family,
        remark,
        tuple(blocks),
        matrices,
        outputs,
        dict(_joints(blocks, matrices, outputs)),
        {name: array.shape for name, array in parameters},
        {name: array.dtype.size for name, array in parameters},
    )


def _blocks(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module, Block]]:
    """The blocks of a model, in the order of their paths."""
    for path, module in sorted(model.named_modules(), key=lambda item: item[0]):
        for block in blocks_of(module, family):
            yield path, module, block


def _shard_block(
    path: str,
    module: nn.Module,
    block: Block,
    model: nn.Module,
    shares: Shares,
) -> BlockShards:
    """Share the units of one block out among the ranks."""
    if isinstance(block.rule, Heads):
        return _shard_heads(path, module, block, block.rule, model, shares)
    if isinstance(block.rule, Width):
        return _shard_width(path, module, block, block.rule, model, shares)
    return BlockShards(path, block, {}, ())


def _shard_heads(
    path: str,
    module: nn.Module,
    block: Block,
    rule: Heads,
    model: nn.Module,
    shares: Shares,
) -> BlockShards:
    """Share out query heads and KV heads."""
    num_heads = _first(module, rule.queries)
    if num_heads is None:
        raise ValueError(f"{path} has none of {', '.join(rule.queries)}")
    num_kv_heads = rule.kv if isinstance(rule.kv, int) else _first(module, rule.kv)
    if num_kv_heads is None and rule.kv_from:
        num_kv_heads = child(model, rule.kv_from)
    counts = {"q": num_heads, "kv": num_kv_heads or num_heads}
    shards = head_shards(
        counts["q"],
        counts["kv"],
        tuple(share.attention for share in shares),
        rule.shared_groups,
        rule.by_query and shares[0].by_query,
    )

    def queries(shard: HeadShard) -> Spans:
        if rule.tiled:
            return tiled(shard, counts["q"], counts["kv"])
        return shard.query_spans

    parts = tuple(
        Part(
            {"q": queries(shard), "kv": shard.kv_spans},
            tuple(zip(shard.kv_heads, shard.query_spans, strict=True)),
        )
        for shard in shards
    )
    return BlockShards(path, block, counts, parts)


def _shard_width(
    path: str,
    module: nn.Module,
    block: Block,
    rule: Width,
    model: nn.Module,
    shares: Shares,
) -> BlockShards:
    """Share out the columns of an MLP."""
    width = _features(child(module, rule.of))[1] // rule.parts
    rows = [target for _, target, cut in targets(module, block) if cut.style == "row"]
    granule = max(max(granule_of(row), _together(row)) for row in rows)
    wanted = [getattr(share, rule.share) for share in shares]
    spans = _width_spans(path, width, granule, wanted)
    parts = tuple(Part({"w": Spans([span])}) for span in spans)
    around = child(model, path.rpartition(".")[0])
    times = child(around, block.times) if block.times else 1
    return BlockShards(path, block, {"w": width}, parts, times)


def _width_spans(
    path: str, width: int, granule: int, shares: Sequence[int]
) -> list[Span]:
    """Cut the columns of an MLP between quantization groups, if that is even enough."""
    if width < len(shares):
        raise ValueError(f"{path} has {width} columns for {len(shares)} ranks")
    if width % granule == 0 and width // granule >= len(shares):
        spans = cut_axis(width, shares, granule)
        excess = [
            Fraction(span.length * sum(shares), width * share)
            for span, share in zip(spans, shares, strict=True)
        ]
        if max(excess) <= UNEVEN and min(excess) > 0:
            return spans
    return cut_axis(width, shares, minimum=1)


def _shard_matrix(
    path: str,
    module: nn.Module,
    target: Any,
    cut: Cut,
    shards: BlockShards,
    summed: bool,
    shares: Shares,
) -> MatrixShards:
    """Every rank's part of one matrix."""

    def width_of(name: str) -> int:
        return int(child(module, name))

    features = _length(target, cut)
    fills: tuple[Fill, ...] = ((),) * len(shares)
    if cut.layout == "v":
        spans: tuple[Spans, ...] = tuple(
            Spans([span])
            for span in cut_axis(
                features, [share.vocabulary for share in shares], minimum=1
            )
        )
    else:
        try:
            axis = cut.layout, features, shards.counts
            spans = tuple(place(*axis, part, width_of) for part in shards.parts)
            fills = tuple(fill(*axis, part, width_of) for part in shards.parts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    together = _together(target) if cut.style == "row" else 1
    covered = tuple(_covered(part, target, cut, features) for part in spans)
    shares_groups = sum(part.length for part in covered) > features
    if cut.style == "row" and isinstance(target, nn.QQLinear) and shares_groups:
        covered = _whole_groups(path, spans, features, together)
    return MatrixShards(
        path,
        cut,
        shards,
        features,
        spans,
        covered,
        summed,
        _width(target, cut),
        groups=int(child(module, cut.groups)) if cut.groups else 1,
        together=together,
        fills=fills,
    )


def _covered(spans: Spans, target: Any, cut: Cut, features: int) -> Spans:
    """What a rank holds of a matrix to compute with `spans`."""
    if cut.style == "row":
        return spans.aligned(granule_of(target))
    if cut.style == "repack":
        return _bytes_of_four(spans, features // 4)
    return spans


def _whole_groups(
    path: str, spans: Sequence[Spans], features: int, size: int
) -> tuple[Spans, ...]:
    """Deal groups of inputs, which are quantized together, out among the ranks.

    Each is one rank's, in proportion to the inputs that the ranks make.
    """
    made = [part.length for part in spans]
    try:
        return tuple(Spans([own]) for own in cut_axis(features, made, size, 1))
    except ValueError as error:
        raise ValueError(
            f"{path} quantizes its inputs in {features // size} groups, too few for "
            f"{len(spans)} ranks: take fewer ranks, or quantize_activations out of "
            "config.json"
        ) from error


def _bytes_of_four(spans: Spans, rows: int) -> Spans:
    """The rows of bytes in which outputs lie; output i is in row i mod `rows`."""
    needed = {place % rows for place in spans.indices}
    return Spans((row, row + 1) for row in needed).merged()


def _joints(
    blocks: Iterable[BlockShards],
    matrices: Mapping[str, MatrixShards],
    outputs: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules, and the ends of two blocks in each, whose sums are made in one."""
    for shards in blocks:
        places: list[str] = []
        for name in shards.block.joint:
            path = f"{shards.path}.{name}" if shards.path else name
            ends = [p for p in outputs if _inside(f"{p}.", [path])] or [
                p
                for p, matrix in matrices.items()
                if _inside(f"{p}.", [path])
                and (matrix.cut.style in ("row", "lookup") or p == path)
                and matrix.summed
                and not matrix.cut.inner
            ]
            places += ends
        if places and len(places) == len(shards.block.joint):
            yield shards.path, tuple(places)


def _inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a path lies below one of the roots."""
    return any(path.startswith(f"{root}.") or root == "" for root in roots)


def _first(module: nn.Module, names: Iterable[str]) -> int | None:
    """The first of the attributes that a module has and that is not zero."""
    return next((n for name in names if (n := getattr(module, name, None))), None)


def granule_of(module: nn.Module) -> int:
    """Input features that must stay together; 1 where nothing is quantized."""
    layer = base(module)
    return getattr(layer, "group_size", 1)


def _together(module: nn.Module) -> int:
    """Inputs that are rotated (Hadamard) or quantized together; 1 where none are."""
    if isinstance(module, nn.QQLinear):
        return int(module.group_size)
    return getattr(module, "block", 0) or 1


def _features(module: nn.Module) -> tuple[int, int]:
    """The output and input features of a linear layer or an embedding."""
    layer = base(module)
    out_features, in_elements = layer.weight.shape[-2:]
    packing = 32 / layer.bits if hasattr(layer, "bits") else 1
    return out_features, round(in_elements * packing)


def _width(target: Any, cut: Cut) -> int:
    """The length of a token's output, where a row or an embedding makes one."""
    if cut.style == "row":
        layer = base(target)
        return int(getattr(layer, "out_features", layer.weight.shape[-2]))
    return _features(target)[1] if cut.style == "lookup" else 0


def _length(target: Any, cut: Cut) -> int:
    """The number of features on the axis that is cut."""
    if isinstance(target, list):
        return len(target)
    if isinstance(target, mx.array):
        return int(target.shape[cut.axis])
    if cut.style == "row":
        return _features(target)[1]
    if cut.style == "repack":
        return int(target.out_features)
    if cut.style in ("column", "lookup", "head"):
        return _features(target)[0]
    return int(base(target).weight.shape[cut.axis if cut.style == "along" else -1])

"""What the table is made of: what a module is and how each of its matrices is cut."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import mlx.nn as nn

from mlxtp.partition.layouts import Part

# What a rank holds of a matrix:
#   column  some of the outputs.
#   row     some of the inputs; the output is partial until it is summed over ranks.
#   lookup  some rows of an embedding.
#   head    some rows of the projection to the logits.
#   along   a part of every array.
#   norm    a part of the weight of a norm over the whole axis.
#   items   some members of a list.
#   repack  some of the outputs, where four that lie far apart share a byte: they are
#           packed anew.
Style = Literal["column", "row", "lookup", "head", "along", "norm", "items", "repack"]


@dataclass(frozen=True)
class Cut:
    """How a module, or a bare parameter, is cut.

    Args:
        layout: what lies on the axis that is cut (`partition.layouts`).
        axis: the axis of every array, for "along".
        inner: the block needs the sum inside, so it is made there; for "row".
        groups: the attribute that says in how many groups the axis is normed; for
            "norm".
    """

    style: Style
    layout: str
    axis: int = 0
    inner: bool = False
    groups: str = ""


def column(layout: str) -> Cut:
    """Some of the outputs, laid out so."""
    return Cut("column", layout)


def row(layout: str, *, inner: bool = False) -> Cut:
    """Some of the inputs, laid out so."""
    return Cut("row", layout, inner=inner)


def along(layout: str, axis: int = 0) -> Cut:
    """A part of every array of the module."""
    return Cut("along", layout, axis)


def norm(layout: str, *, groups: str = "") -> Cut:
    """A part of the weight of a norm over the whole axis."""
    return Cut("norm", layout, groups=groups)


LOOKUP = Cut("lookup", "v")
HEAD = Cut("head", "v")

QUERY_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head", "q_num_heads")
KV_HEADS = (
    "n_kv_heads", "num_kv_heads", "num_key_value_heads", "k_num_heads", "v_num_heads"
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """A rank gets heads: `q` query heads, under `kv` KV heads.

    Args:
        queries: attributes that hold the number of query heads. A module has one or
            more of them; all are set to the rank's number.
        kv: the same for KV heads, or their number. A module with none of the attributes
            has as many KV heads as query heads.
        kv_from: an attribute of the whole model with the number of KV heads, for a
            module that does not know it.
        shared_groups: ranks may share a KV head where that is more even, because what
            belongs to it is small beside the query heads under it.
        tiled: query head h is under KV head h mod KV, not under the one of its group.
        by_query: query heads may be shared out one by one, where shares say so: zeros
            make up the rectangle that the forward pass wants.
        states: what is cached are states of the query heads, no keys and values.
    """

    queries: tuple[str, ...] = QUERY_HEADS
    kv: tuple[str, ...] | int = KV_HEADS
    kv_from: str = ""
    shared_groups: bool = False
    tiled: bool = False
    by_query: bool = False
    states: bool = False


@dataclass(frozen=True)
class Width:
    """A rank gets columns `w`: some inputs of a row-parallel matrix.

    Args:
        of: the row-parallel matrix.
        parts: how many parts of equal length its inputs have; a rank gets the same
            columns of each.
        share: the part of a rank's `Share` that counts.
    """

    of: str
    parts: int = 1
    share: Literal["attention", "mlp"] = "mlp"


@dataclass(frozen=True)
class VocabularyRows:
    """A rank gets rows `v` of a vocabulary."""


@dataclass(frozen=True)
class Block:
    """A module of a known shape: what it holds and how that is cut.

    Args:
        name: what the pattern is called.
        needs: children that tell a module of this shape.
        rule: what is shared out among the ranks.
        cuts: by the path of a child; a module need not have all of them.
        sizes: attributes that are the length of an axis, with its layout; "q/kv" is
            the number of query heads under a KV head.
        shared: children that every rank holds whole, and why.
        sums: where row-parallel outputs are summed: at each matrix ("rows"), at the
            output of this whole module ("output"), or in what `adapt` puts in.
        joint: two children whose sums are made in one: their outputs are only added,
            or they are norms.
        times: an attribute of the module around it that says how many outputs a token
            has, if it is not one.
        more: elements that another allreduce of the block sums for a token.
        when: an attribute without which the block is something else.
        adapt: the adapter that changes the forward pass besides, by its name in
            `layers.adapt.table.ADAPTERS`.
    """

    name: str
    needs: tuple[str, ...]
    rule: Heads | Width | VocabularyRows | None = None
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    sums: Literal["rows", "output", "inside"] = "rows"
    joint: tuple[str, ...] = ()
    times: str = ""
    more: int = 0
    when: str = ""
    adapt: str = ""

    def but(self, name: str = "", **changes: Any) -> "Block":
        """This block with other contents; those of `cuts` and the like are added."""
        for key in ("cuts", "sizes", "shared"):
            if key in changes:
                changes[key] = {**getattr(self, key), **changes[key]}
        return replace(self, name=name or self.name, **changes)

    def fits(self, module: nn.Module) -> bool:
        """Whether a module has the children and the attribute that tell the block."""
        return all(child(module, need) is not None for need in self.needs) and (
            not self.when or bool(getattr(module, self.when, False))
        )


@dataclass(frozen=True)
class BlockShards:
    """A block of a model, how many units it has, and what every rank computes.

    A token's output is `times` as long as one of its matrices says.
    """

    path: str
    block: Block
    counts: Mapping[str, int]
    parts: tuple[Part, ...]
    times: int = 1


@dataclass(frozen=True)
class Family:
    """Models that are made of the same blocks.

    Args:
        blocks: the more particular first: a child belongs to the first block.
        shared: modules that every rank holds whole wherever they are, and why.
        loops: a cache depends on the last layer's output as well: the layer is called
            again, or another cache comes after its sums.
    """

    blocks: tuple[Block, ...]
    shared: Mapping[str, str] = field(default_factory=dict)
    loops: bool = False


def base(module: nn.Module) -> nn.Module:
    """The layer under an adapter, or the layer itself."""
    return next((module[k] for k in ("linear", "embedding") if k in module), module)


def child(module: Any, path: str) -> Any:
    """What `module` has at `path`, or None."""
    for name in path.split(".") if path else []:
        if isinstance(module, list):
            module = module[int(name)] if int(name) < len(module) else None
        elif isinstance(module, dict) and name in module:
            module = module[name]
        else:
            module = getattr(module, name, None)
        if module is None:
            return None
    return module


def targets(module: nn.Module, block: Block) -> Iterator[tuple[str, Any, Cut]]:
    """What `block` cuts of a module, as far as the module has it."""
    for name, cut in block.cuts.items():
        if name.endswith(".*"):
            members = child(module, name[:-2]) or []
            for number, member in enumerate(members):
                yield f"{name[:-2]}.{number}", member, cut
        elif (target := child(module, name)) is not None:
            yield name, target, cut


def blocks_of(module: nn.Module, family: Family) -> Iterator[Block]:
    """The blocks that a module is; a child belongs to the first block that cuts it."""
    if "lora_a" in module:  # a layer with an adapter, no block
        return
    claimed: set[str] = set()
    for block in family.blocks:
        if not block.fits(module) or claimed & set(block.needs):
            continue
        if block.rule is not None:
            claimed |= {name for name, _, _ in targets(module, block)}
        yield block

"""The slice table as data: what every rank owns, and what can be read off it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mlxtp.families.blocks import BlockShards, Cut, Family, along
from mlxtp.partition.layouts import Fill
from mlxtp.partition.spans import Slice, Spans, keeps_groups_whole
from mlxtp.sharding.report import Row, report

# The axis of each parameter that a cut divides, by the parameter's last name. Weights
# are (..., out, in), lora_a (in, r), lora_b (r, out), m (out). What is missing here is
# replicated: a row-parallel bias is added once, after the sum.
CUT_AXIS = {
    "column": {"weight": -2, "scales": -2, "biases": -2, "bias": -1, "lora_b": -1,
               "m": -1},
    "row": {"weight": -1, "scales": -1, "biases": -1, "lora_a": -2},
    "lookup": {"weight": -2, "scales": -2, "biases": -2, "lora_a": -2, "m": -1},
    "head": {"weight": -2, "scales": -2, "biases": -2, "bias": -1, "lora_b": -1,
             "m": -1},
    "norm": {"weight": -1},
    "repack": {"weight": -2, "bias": -1},
    "items": {},
}  # fmt: skip
# Those of experts lie the other way round: lora_a (E, r, in), lora_b (E, out, r).
EXPERT_LORA_AXIS = {"lora_a": -1, "lora_b": -2}


@dataclass(frozen=True)
class MatrixShards:
    """A matrix that is cut, and every rank's part, in features of the cut axis.

    Args:
        features: the length of the axis.
        spans: the features that each rank computes with.
        covered: the features that each rank holds. Of a row cut through a quantized
            matrix these are whole groups, and no rank's twice where inputs are gathered
            to be quantized; where four outputs share a byte, rows of bytes.
        summed: whether a partial output is summed here.
        width: the elements of a token's output.
        groups: in how many groups the axis of a norm is normed.
        together: how many inputs are rotated or quantized with each other before they
            are multiplied.
        fills: where zeros stand among a rank's features in its attention.
    """

    path: str
    cut: Cut
    block: BlockShards
    features: int
    spans: tuple[Spans, ...]
    covered: tuple[Spans, ...]
    summed: bool
    width: int
    groups: int = 1
    together: int = 1
    fills: tuple[Fill, ...] = ()

    @property
    def gathers_inputs(self) -> bool:
        """Whether ranks have parts of inputs that have to be together."""
        edges = (edge for part in self.spans for span in part for edge in span)
        return any(edge % self.together for edge in edges)


@dataclass(frozen=True)
class Collective:
    """A collective of a forward pass, and its elements for one token."""

    path: str
    kind: str
    elements: int


@dataclass(frozen=True)
class SliceTable:
    """What every rank owns of one model.

    Printed, it is a table for people.

    Args:
        remark: what is to be said of the family: that it was recognised.
        matrices: by path.
        outputs: the modules whose whole output is summed, by path.
        joints: places that make one sum together, by the path of the module that adds
            their outputs, or that norms with both.
        parameters: the shapes of the whole model.
        item_bytes: the bytes of an element of each parameter.
    """

    family: Family
    remark: str
    blocks: tuple[BlockShards, ...]
    matrices: dict[str, MatrixShards]
    outputs: dict[str, BlockShards]
    joints: dict[str, tuple[str, ...]]
    parameters: dict[str, tuple[int, ...]] = field(repr=False)
    item_bytes: dict[str, int] = field(repr=False)

    @property
    def ranks(self) -> int:
        """The number of ranks that the model is split over."""
        return len(next(iter(self.matrices.values())).spans)

    @property
    def vocabulary_rows(self) -> int:
        """The rows of the embedding: tokens of the model are below this number."""
        lookups = (m for m in self.matrices.values() if m.cut.style == "lookup")
        return next(lookups).features

    def __str__(self) -> str:
        """A table for people: blocks, matrices, styles, every rank's part, bytes."""
        held = [self.nbytes(rank) for rank in range(self.ranks)]
        sizes = {path: [0] * self.ranks for path in self.matrices}
        uncut = [0] * self.ranks
        for rank, of_rank in enumerate(held):
            for name, nbytes in of_rank.items():
                matrix = self.matrix_of(name)
                (sizes[matrix.path] if matrix else uncut)[rank] += nbytes
        rows = (
            Row(
                matrix.block.block.name,
                path,
                matrix.cut.style,
                matrix.features,
                matrix.covered if matrix.cut.style == "row" else matrix.spans,
                tuple(sizes[path]),
            )
            for path, matrix in self.matrices.items()
        )
        return report(rows, uncut)

    def unexplained(self) -> list[str]:
        """Matrices that are neither cut nor named as shared."""
        shared = set(self.family.shared)
        own: dict[str, set[str]] = {}
        for shards in self.blocks:
            own.setdefault(shards.path, set()).update(shards.block.shared)
        result = set()
        for name, shape in self.parameters.items():
            is_vector = sum(length > 1 for length in shape) < 2
            if is_vector or self.matrix_of(name):
                continue
            names = name.split(".")
            above = (
                names[i] in own.get(".".join(names[:i]), ()) for i in range(len(names))
            )
            if not shared & set(names) and not any(above):
                result.add(name.rpartition(".")[0] or name)
        return sorted(result)

    def collectives(self) -> list["Collective"]:
        """What a token's forward pass sends, in the order of the layers' names."""
        made = [self._of_matrix(matrix) for matrix in self.matrices.values()]
        made += [
            Collective(shards.path, "allreduce", self._width(shards))
            for shards in self.blocks
            if shards.path in self.outputs or shards.block.sums == "inside"
        ]
        made += [
            Collective(f"{matrix.path} (inputs)", "allgather", matrix.features)
            for matrix in self.matrices.values()
            if matrix.gathers_inputs
        ]
        made += [
            Collective(shards.path, "allreduce", shards.block.more)
            for shards in self.blocks
            if shards.block.more
        ]
        by_path = {one.path: one for one in made if one is not None}
        if not any(_makes_logits(matrix.cut) for matrix in self.matrices.values()):
            by_path |= {one.path: one for one in self._of_tied_head()}
        for first, *others in self.joints.values():
            for path in others:
                joined = by_path.pop(path)
                if self._is_norm(path):
                    elements = by_path[first].elements + joined.elements
                    by_path[first] = Collective(first, joined.kind, elements)
        return sorted(by_path.values(), key=lambda one: one.path)

    @property
    def joint_sums(self) -> dict[str, tuple[str, ...]]:
        """The `joints` whose outputs are added: not those of norms."""
        return {
            path: places
            for path, places in self.joints.items()
            if not any(self._is_norm(place) for place in places)
        }

    def _is_norm(self, path: str) -> bool:
        return path in self.matrices and self.matrices[path].cut.style == "norm"

    def _of_matrix(self, matrix: MatrixShards) -> "Collective | None":
        cut, path = matrix.cut, matrix.path
        if _makes_logits(cut):
            return Collective(path, "allgather", matrix.features)
        if cut.style == "norm":
            size = matrix.features // matrix.groups
            if keeps_groups_whole(matrix.spans, size):
                return None
            return Collective(path, "allreduce", matrix.groups)
        if cut.style in ("row", "lookup") and matrix.summed:
            return Collective(path, "allreduce", matrix.width)
        return None

    def _of_tied_head(self) -> Iterator["Collective"]:
        """The gather of a head that is the embedding."""
        tables = [m for m in self.matrices.values() if m.cut.style == "lookup"]
        yield Collective(f"{tables[0].path} (tied)", "allgather", tables[0].features)

    def _width(self, shards: BlockShards) -> int:
        """Elements of a sum of a whole block: side by side where it is made inside."""
        rows = {
            matrix.path: matrix.width
            for matrix in self.matrices.values()
            if matrix.cut.style in ("row", "lookup")
            and matrix.path.startswith(f"{shards.path}.")
            and not matrix.summed
        }
        inside = shards.block.sums == "inside"
        one = sum(rows.values()) if inside else next(iter(rows.values()))
        return one * shards.times

    def slices(self, rank: int) -> dict[str, Slice]:
        """The slice of every parameter that `rank` owns, by the parameter's path."""
        return {
            name: self._slice(name, shape, rank)
            for name, shape in self.parameters.items()
        }

    def nbytes(self, rank: int) -> dict[str, int]:
        """The bytes of every parameter that `rank` owns, by the parameter's path."""
        return {
            name: part.size * self.item_bytes[name]
            for name, part in self.slices(rank).items()
        }

    def matrix_of(self, parameter: str) -> MatrixShards | None:
        """The matrix that a parameter belongs to: LoRA's lie a level deeper."""
        for path in _upwards(parameter):
            if path in self.matrices:
                return self.matrices[path]
        return None

    def _slice(self, name: str, shape: tuple[int, ...], rank: int) -> Slice:
        matrix = self.matrix_of(name)
        axis = _cut_axis(matrix, name, len(shape)) if matrix else None
        if matrix is None or axis is None:
            return Slice(shape)
        elements, features, covered = shape[axis], matrix.features, matrix.covered[rank]
        if matrix.cut.style == "column" and name.endswith(".bias"):
            # Outputs that share a byte have a bias each.
            parts = getattr(matrix.block.block.rule, "parts", 1)
            covered = Spans(
                (start + part * features, stop + part * features)
                for part in range(parts)
                for start, stop in covered
            )
            features *= parts
        if matrix.cut.style == "repack":
            # Bytes of four outputs: covered are whole bytes.
            is_bias = axis == -1
            return Slice(
                shape, len(shape) + axis, matrix.spans[rank] if is_bias else covered
            )
        # Packed weights and scales have fewer elements than features.
        spans = Spans(
            (start * elements // features, stop * elements // features)
            for start, stop in covered
        )
        return Slice(shape, len(shape) + axis, spans)


def _makes_logits(cut: Cut) -> bool:
    """Whether what is cut is a head: a layer, or a bare matrix."""
    return cut.style == "head" or cut == along("v")


def _cut_axis(matrix: MatrixShards, parameter: str, ndim: int) -> int | None:
    """The axis, counted from the last, that a parameter is cut on, if it is."""
    leaf = parameter.rpartition(".")[2]
    style = matrix.cut.style
    if style == "along":
        return matrix.cut.axis - ndim
    if leaf in EXPERT_LORA_AXIS and ndim == 3:
        return EXPERT_LORA_AXIS[leaf] if leaf in CUT_AXIS[style] else None
    return CUT_AXIS[style].get(leaf)


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]

"""The slice table as people read it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tqdm import tqdm

from mlxtp.partition.spans import Spans

if TYPE_CHECKING:
    from mlxtp.sharding.table import SliceTable


@dataclass(frozen=True)
class Row:
    """A matrix that is cut: what a line says of it.

    Args:
        path: with `{}` for the number of the layer, if it is in one.
        parts: what each rank holds of the axis that is cut.
        nbytes: what each rank holds of its parameters, quantization included.
    """

    block: str
    path: str
    style: str
    features: int
    parts: tuple[str, ...]
    nbytes: tuple[int, ...]


def report(table: "SliceTable") -> str:
    """Write the matrices that are cut, each rank's part of each, and its bytes.

    Layers that are alike share a line, which has the bytes of all of them.
    """
    ranks = range(table.ranks)
    held = [table.nbytes(rank) for rank in ranks]
    rows = _folded(table, held)
    cells = [
        ["block", "matrix", "style", "of"],
        *(
            [row.block, row.path.format(_ranges(layers)), row.style, str(row.features)]
            for row, layers in rows.items()
        ),
        ["", "not cut, whole on every rank", "", ""],
        ["", "all", "", ""],
    ]
    for rank in ranks:
        whole = sum(n for name, n in held[rank].items() if not table.matrix_of(name))
        sizes = [row.nbytes[rank] * len(layers) for row, layers in rows.items()]
        parts = [f"rank {rank}", *(row.parts[rank] for row in rows), "", ""]
        totals = [_size(n) for n in (*sizes, whole, sum(held[rank].values()))]
        for line, part, size in zip(cells, parts, ["bytes", *totals], strict=True):
            line += [part, size]
    return "\n".join(_aligned(cells))


def _folded(
    table: "SliceTable", held: list[dict[str, int]]
) -> dict[Row, list[int | None]]:
    """Rows, each with the layers that it is said of."""
    sizes: list[dict[str, int]] = []
    for of_rank in held:
        of_matrices = dict.fromkeys(table.matrices, 0)
        for name, nbytes in of_rank.items():
            if matrix := table.matrix_of(name):
                of_matrices[matrix.path] += nbytes
        sizes.append(of_matrices)
    rows: dict[Row, list[int | None]] = {}
    for path, matrix in table.matrices.items():
        pattern, layer = _split_number(path)
        parts = matrix.covered if matrix.cut.style == "row" else matrix.spans
        row = Row(
            matrix.block.block.name,
            pattern,
            matrix.cut.style,
            matrix.features,
            tuple(_part(spans) for spans in parts),
            tuple(of_matrices[path] for of_matrices in sizes),
        )
        rows.setdefault(row, []).append(layer)
    return rows


def _split_number(path: str) -> tuple[str, int | None]:
    """A path with `{}` for its first number, and the number."""
    names = path.split(".")
    for place, name in enumerate(names):
        if name.isdigit():
            return ".".join([*names[:place], "{}", *names[place + 1 :]]), int(name)
    return path, None


def _ranges(layers: Iterable[int | None]) -> str:
    """Numbers as ranges: 0, 1, 2, 5 -> 0-2,5."""
    numbers = sorted(number for number in layers if number is not None)
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    ranges = [numbers[a:b] for a, b in pairwise([0, *breaks, len(numbers)])]
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ranges if run
    )


def _part(spans: Spans) -> str:
    """Spans as Python slices; where there are many, how many features they have."""
    joined = spans.joined()
    if len(joined) > 2:
        return f"{joined.length} in {len(joined)} spans"
    return " ".join(f"{start}:{stop}" for start, stop in joined)


def _size(nbytes: int) -> str:
    return str(tqdm.format_sizeof(nbytes, "B"))


def _aligned(cells: list[list[str]]) -> Iterator[str]:
    """Lines with columns as wide as their longest cell; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(
            cell.rjust(width) if column >= 3 and column % 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()

"""The slice table as people read it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tqdm import tqdm

from mlxtp.partition.spans import Spans


@dataclass(frozen=True)
class Row:
    """A matrix that is cut: what a line says of it.

    Args:
        path: of the matrix in the model; `report` leaves out the number of its layer.
        parts: what each rank holds of the axis that is cut.
        nbytes: what each rank holds of its parameters, quantization included.
    """

    block: str
    path: str
    style: str
    features: int
    parts: tuple[Spans, ...]
    nbytes: tuple[int, ...]


def report(rows: Iterable[Row], uncut: Sequence[int]) -> str:
    """Write the matrices that are cut, each rank's part of each, and its bytes.

    Layers that are alike share a line, which has the bytes of all of them. `uncut` are
    the bytes of what every rank holds whole.
    """
    folded: dict[Row, list[int | None]] = {}
    for row in rows:
        pattern, layer = _split_number(row.path)
        folded.setdefault(replace(row, path=pattern), []).append(layer)
    cells = [
        ["block", "matrix", "style", "of"],
        *(
            [row.block, row.path.format(_ranges(layers)), row.style, str(row.features)]
            for row, layers in folded.items()
        ),
        ["", "not cut, whole on every rank", "", ""],
        ["", "all", "", ""],
    ]
    for rank, whole in enumerate(uncut):
        sizes = [row.nbytes[rank] * len(layers) for row, layers in folded.items()]
        parts = [f"rank {rank}", *(_part(row.parts[rank]) for row in folded), "", ""]
        totals = [_size(n) for n in (*sizes, whole, sum(sizes) + whole)]
        for line, part, size in zip(cells, parts, ["bytes", *totals], strict=True):
            line += [part, size]
    return "\n".join(_aligned(cells))


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

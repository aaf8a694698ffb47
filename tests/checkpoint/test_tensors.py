"""Slices are read right, and with few bytes beside them, with C++ and without."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs
from safetensors.numpy import save_file

from mlxtp.checkpoint import runs
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.runs import PAGE_BYTES
from mlxtp.checkpoint.tensors import Piece, StoredTensor, Tensor
from mlxtp.native import build, loader
from mlxtp.partition.spans import Slice, Span, Spans

pytestmark = pytest.mark.once


@pytest.fixture(scope="module", autouse=True, params=["C++", "Python"])
def language(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test twice, with what is compiled and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "C++":
            loader.load(build.reading(), print)
            loader.reading.cache_clear()
            assert loader.reading() is not None
        else:
            patch.setattr(loader, "reading", lambda: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    if draw(st.booleans()):  # rows far apart: read piece by piece
        shape = (*shape[:-1], shape[-1] * 300)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...]) -> Slice:
    axis = draw(st.integers(0, len(shape) - 1))
    edges = st.integers(0, shape[axis])
    cuts = sorted(draw(st.lists(edges, min_size=2, max_size=6)))
    return Slice(shape, axis, Spans(zip(cuts[::2], cuts[1::2], strict=False)))


def numpy_slice(whole: np.ndarray, part: Slice) -> np.ndarray:
    assert part.axis is not None
    index = part.spans.indices
    return np.take(whole, index, part.axis)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_read_is_numpy_slicing(folder: Path, data: st.DataObject) -> None:
    whole = data.draw(arrays())
    part = data.draw(slices(whole.shape))
    save_file({"before": whole[:1], "x": whole}, folder / "model.safetensors")
    tensor = Checkpoint.of_files([folder / "model.safetensors"]).tensors["x"]
    expected = numpy_slice(whole, part)
    assert np.array_equal(np.array(tensor.read(part)), expected)
    assert np.array_equal(np.array(tensor.read(Slice(whole.shape))), whole)
    assert tensor.missing(part) is None
    with pytest.MonkeyPatch.context() as patch:
        most = max(1000, expected.nbytes // 100)
        patch.setattr(runs, "BLOCK_BYTES", most)
        blocks = list(tensor.blocks(part))
    assert b"".join(block.tobytes() for block in blocks) == expected.tobytes()
    assert all(0 < block.size <= most for block in blocks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_read_from_pieces(folder: Path, data: st.DataObject) -> None:
    """Pieces that overlap, leave gaps, or lie on another axis than what is read."""
    whole = data.draw(arrays())
    axis = data.draw(st.integers(0, whole.ndim - 1))
    parts = [
        Slice(whole.shape, axis, part.spans)
        for part in data.draw(st.lists(slices(whole.shape), min_size=1, max_size=4))
        if part.axis == axis
    ]
    here = Spans(span for part in parts for span in part.spans).merged()
    file = folder / "pieces"
    file.write_bytes(b"".join(numpy_slice(whole, part).tobytes() for part in parts))
    pieces, offset = [], 0
    for part in parts:
        pieces.append(Piece(file, offset, part))
        offset += part.size * 4
    tensor = StoredTensor(Tensor("x", "I32", whole.shape), tuple(pieces))
    wanted = data.draw(slices(whole.shape))
    needed = set(wanted.on(axis).indices)
    lacking = needed - {i for a, b in here for i in range(a, b)}
    missing = tensor.missing(wanted)
    if wanted.size == 0:
        return
    if lacking:
        assert missing is not None
        assert {*missing.on(axis).indices} == lacking or not pieces
        with pytest.raises(OSError, match=r"x: of axis . .* is not here"):
            tensor.read(wanted)
    else:
        assert missing is None
        expected = numpy_slice(whole, wanted)
        assert np.array_equal(np.array(tensor.read(wanted)), expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "BLOCK_BYTES", max(1000, expected.nbytes // 100))
            in_blocks = b"".join(block.tobytes() for block in tensor.blocks(wanted))
        assert in_blocks == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_read_across_the_cut(folder: Path, data: st.DataObject) -> None:
    """From pieces on one axis that are all there, a slice of another; and both."""
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4)))
    whole = np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)
    axis = data.draw(st.integers(0, len(shape) - 1))
    middle = data.draw(st.integers(0, shape[axis]))
    rest = [(0, middle // 2), (middle // 2, middle)]
    parts = [
        Slice(shape, axis, Spans([(middle, shape[axis])])),
        Slice(shape, axis, Spans(reversed(rest))),  # joined in another order
        Slice(shape, (axis + 1) % len(shape), Spans([(0, 1)])),  # enough for little
    ]
    file = folder / "across"
    file.write_bytes(b"".join(numpy_slice(whole, part).tobytes() for part in parts))
    pieces, offset = [], 0
    for part in parts:
        pieces.append(Piece(file, offset, part))
        offset += part.size * 4
    tensor = StoredTensor(Tensor("x", "I32", shape), tuple(pieces))
    wanted = data.draw(slices(shape))
    expected = numpy_slice(whole, wanted)
    assert tensor.missing(wanted) is None
    assert np.array_equal(np.array(tensor.read(wanted)), expected)
    assert np.array_equal(np.array(tensor.read(Slice(shape))), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "BLOCK_BYTES", 100)
        patch.setattr(runs, "PAGE_BYTES", data.draw(st.sampled_from([1, 10**6])))
        in_blocks = b"".join(block.tobytes() for block in tensor.blocks(wanted))
    assert in_blocks == expected.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_items_of_some_rows(folder: Path, data: st.DataObject) -> None:
    whole = data.draw(arrays())
    part = data.draw(slices(whole.shape))
    assert part.axis is not None
    file = folder / "items"
    file.write_bytes(whole.tobytes())
    other = data.draw(st.integers(0, whole.ndim - 1))
    pieces = (  # there twice, cut on two axes
        Piece(file, 0, Slice(whole.shape, axis, Spans.whole(whole.shape[axis])))
        for axis in (other, part.axis)
    )
    tensor = StoredTensor(Tensor("x", "I32", whole.shape), tuple(pieces))
    rows = tensor.tensor.seen_from(part.axis).rows
    first = data.draw(st.integers(0, rows - 1))
    some = Span(first, data.draw(st.integers(first + 1, rows)))
    expected = numpy_slice(whole, part).reshape(rows, -1)[slice(*some)]
    assert tensor.items(part.axis, some, part.spans).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("part", "calls"),
    [
        (Slice((6, 500)), 1),
        (Slice((6, 500), 0, Spans([(1, 2), (2, 5)])), 1),
        (Slice((6, 500), 0, Spans([(4, 6), (0, 2)])), 2),
        (Slice((6, 500), 1, Spans([(10, 20), (30, 40)])), 1),
        (Slice((6, 5000), 1, Spans([(10, 20), (300, 400)])), 12),
    ],
)
def test_system_calls(
    part: Slice, calls: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows in one; columns in blocks, unless a page or more lies between."""
    file = folder / "calls"
    file.write_bytes(bytes(4 * 6 * 5000))
    made = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[Any], offset: int) -> int:
        made.append(offset)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(loader, "reading", lambda: None)  # its calls are not seen
    StoredTensor.whole("x", "I32", part.full_shape, file, 0).read(part)
    assert len(made) == calls


@pytest.mark.parametrize(
    "dtype", [mx.bfloat16, mx.float16, mx.uint8, mx.bool_], ids=str
)
def test_dtypes(folder: Path, dtype: mx.Dtype) -> None:
    x = mx.random.normal((6, 8)).astype(dtype)
    mx.save_safetensors(str(folder / "model-t.safetensors"), {"x": x, "s": x[0, 0]})
    tensors = Checkpoint.of_files([folder / "model-t.safetensors"]).tensors
    part = tensors["x"].read(Slice((6, 8), 1, Spans([(1, 3), (5, 8)])))
    assert part.dtype == dtype
    assert mx.array_equal(part, mx.concatenate([x[:, 1:3], x[:, 5:8]], axis=1))
    assert tensors["s"].read(Slice(())).item() == x[0, 0].item()


@needs("linux")
@pytest.mark.parametrize("row", [PAGE_BYTES * 8, PAGE_BYTES // 4])
def test_bytes_read(folder: Path, row: int) -> None:
    shape = (400, row)
    mx.save_safetensors(
        str(folder / "model-b.safetensors"), {"x": mx.zeros(shape, mx.uint8)}
    )
    tensor = Checkpoint.of_files([folder / "model-b.safetensors"]).tensors["x"]

    def bytes_read(part: Slice) -> int:
        before = _read_by_this_process()
        tensor.read(part)
        return _read_by_this_process() - before

    overhead = (
        bytes_read(Slice(shape, 0, Spans([(0, 1)]))) - row
    )  # of reading the counter
    rows = Slice(shape, 0, Spans([(80, 160)]))
    assert bytes_read(rows) - overhead == rows.size
    columns = Slice(shape, 1, Spans([(row // 5, 2 * row // 5)]))
    count = bytes_read(columns) - overhead
    # Closer together than a page, what lies between is read as well.
    assert count == columns.size if row > PAGE_BYTES else count <= 400 * row


def _read_by_this_process() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_a_file_that_shrinks_meanwhile_is_an_error(folder: Path) -> None:
    file = folder / "model-s.safetensors"
    shape = (100, 4000)
    mx.save_safetensors(str(file), {"x": mx.zeros(shape)})
    tensor = Checkpoint.of_files([file]).tensors["x"]
    size = file.stat().st_size
    os.truncate(file, size - 4)
    for part in (Slice(shape), Slice(shape, 1, Spans([(0, 10), (3000, 4000)]))):
        with pytest.raises(OSError, match=f"the file ends at byte {size - 4}, inside"):
            tensor.read(part)
    tensor.read(Slice(shape, 1, Spans([(0, 10), (2000, 3000)])))


@needs("linux")
def test_what_the_disk_says_is_an_error() -> None:
    """This process's memory is a file that the system refuses to read at its start."""
    shape = (10, 10000)
    tensor = StoredTensor.whole("x", "U8", shape, Path("/proc/self/mem"), 0)
    for part in (Slice(shape), Slice(shape, 1, Spans([(0, 10), (5000, 5010)]))):
        with pytest.raises(OSError, match="Input/output error"):
            tensor.read(part)

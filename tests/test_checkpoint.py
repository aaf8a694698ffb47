"""Slices are read right, and with few bytes beside them."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mlxtp import checkpoint
from mlxtp.checkpoint import PAGE_BYTES, Checkpoint
from mlxtp.partition import Slice

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_read_is_numpy_slicing(folder: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    if data.draw(st.booleans()):  # rows far apart: read piece by piece
        shape = (*shape[:-1], shape[-1] * 300)
    axis = data.draw(st.integers(0, len(shape) - 1))
    edges = st.integers(0, shape[axis])
    cuts = sorted(data.draw(st.lists(edges, min_size=2, max_size=6)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    whole = np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)
    save_file({"before": whole[:1], "x": whole}, folder / "model.safetensors")
    tensor = Checkpoint([folder / "model.safetensors"]).tensors["x"]
    index = [i for start, stop in spans for i in range(start, stop)]
    read = checkpoint.read(tensor, Slice(shape, axis, spans))
    assert np.array_equal(np.array(read), np.take(whole, index, axis))
    assert np.array_equal(np.array(checkpoint.read(tensor, Slice(shape))), whole)


@pytest.mark.parametrize(
    "dtype", [mx.bfloat16, mx.float16, mx.uint8, mx.bool_], ids=str
)
def test_dtypes(folder: Path, dtype: mx.Dtype) -> None:
    x = mx.random.normal((6, 8)).astype(dtype)
    mx.save_safetensors(str(folder / "model-t.safetensors"), {"x": x, "s": x[0, 0]})
    tensors = Checkpoint([folder / "model-t.safetensors"]).tensors
    part = checkpoint.read(tensors["x"], Slice((6, 8), 1, ((1, 3), (5, 8))))
    assert part.dtype == dtype
    assert mx.array_equal(part, mx.concatenate([x[:, 1:3], x[:, 5:8]], axis=1))
    assert checkpoint.read(tensors["s"], Slice(())).item() == x[0, 0].item()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io is Linux's")
@pytest.mark.parametrize("row", [PAGE_BYTES * 8, PAGE_BYTES // 4])
def test_bytes_read(folder: Path, row: int) -> None:
    shape = (400, row)
    mx.save_safetensors(
        str(folder / "model-b.safetensors"), {"x": mx.zeros(shape, mx.uint8)}
    )
    tensor = Checkpoint([folder / "model-b.safetensors"]).tensors["x"]

    def bytes_read(part: Slice) -> int:
        before = _read_by_this_process()
        checkpoint.read(tensor, part)
        return _read_by_this_process() - before

    overhead = bytes_read(Slice(shape, 0, ((0, 1),))) - row  # of reading the counter
    rows = Slice(shape, 0, ((80, 160),))
    assert bytes_read(rows) - overhead == rows.size
    columns = Slice(shape, 1, ((row // 5, 2 * row // 5),))
    read = bytes_read(columns) - overhead
    # Closer together than a page, what lies between is read as well.
    assert read == columns.size if row > PAGE_BYTES else read <= 400 * row


def _read_by_this_process() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_a_file_that_shrinks_meanwhile_is_an_error(folder: Path) -> None:
    file = folder / "model-s.safetensors"
    mx.save_safetensors(str(file), {"x": mx.zeros((100, 100))})
    tensor = Checkpoint([file]).tensors["x"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(OSError, match="the file ends at byte"):
        checkpoint.read(tensor, Slice((100, 100)))

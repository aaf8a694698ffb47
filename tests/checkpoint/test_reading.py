"""Memory that is read into, and threads that read ahead."""

import gc
import os
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from needs import needs

from mlxtp.checkpoint import readahead
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.readahead import ReadAhead
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.native import build, loader
from mlxtp.partition.spans import Slice, Spans

pytestmark = pytest.mark.once


@pytest.fixture(params=["C++", "Python"])
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "C++":
        loader.load(build.reading(), print)
        loader.reading.cache_clear()
        assert loader.reading() is not None
    else:
        monkeypatch.setattr(loader, "reading", lambda: None)


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.uint8, mx.bool_, mx.int64], ids=str)
def test_the_memory_is_the_array(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """What is written into it is in the array, and each keeps the other."""
    array, memory = allocate(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert (memory.dtype, memory.shape) == (np.uint8, (array.nbytes,))
    content = np.arange(array.nbytes, dtype=np.uint8) % 2
    memory[:] = content
    assert np.array_equal(np.asarray(array.reshape(-1).view(mx.uint8)), content)
    del array
    gc.collect()
    assert np.array_equal(memory, content)
    array, memory = allocate(shape, dtype)
    memory[:] = content
    del memory
    gc.collect()
    total = mx.sum(array.reshape(-1).view(mx.uint8)).item()
    assert total == content.sum()


@needs("linux")
def test_memory_is_untouched_until_it_is_read_into() -> None:
    loader.load(build.reading(), print)

    def anonymous_kb() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    before = anonymous_kb()
    array, memory = allocate((64, 1 << 20), mx.uint8)
    assert anonymous_kb() - before < 4096
    memory[:] = 1
    assert anonymous_kb() - before > 60000
    del array, memory


def test_what_is_not_compiled_is_not_compiled_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("nothing is to be run")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("subprocess.Popen", nothing)
    loader.reading.cache_clear()
    try:
        assert loader.reading() is None
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(build, "reading", fail)
        loader.reading.cache_clear()
        assert loader.reading() is None
    finally:
        loader.reading.cache_clear()


def fail() -> None:
    raise build.BuildError("no headers")


SHAPES = {"a": (300, 50), "b": (40, 9000), "c": (1,), "d": (5, 7, 11), "e": (20, 9000)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    random = np.random.default_rng(0)
    arrays = {
        name: mx.array(random.integers(0, 256, shape).astype(np.uint8))
        for name, shape in SHAPES.items()
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    return Checkpoint.of_files([tmp_path / "model.safetensors"])


def wanted_of(checkpoint: Checkpoint) -> list[tuple[Tensor, Slice]]:
    """Whole tensors, rows, and columns that lie apart."""
    parts = {
        "a": Slice((300, 50), 0, Spans([(10, 290)])),
        "b": Slice((40, 9000), 1, Spans([(5, 2000), (8000, 8500)])),
        "c": Slice((1,)),
        "d": Slice((5, 7, 11), 1, Spans([(2, 5)])),
        "e": Slice((20, 9000)),
    }
    return [(checkpoint.tensors[name].tensor, part) for name, part in parts.items()]


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize("part_bytes", [100, 5000, 10**6])
def test_reading_ahead(
    checkpoint: Checkpoint, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slices are divided, they are what reads without threads give."""
    monkeypatch.setattr(readahead, "PART_BYTES", part_bytes)
    wanted = wanted_of(checkpoint)
    first = [(tensor, part) for tensor, part in wanted if tensor.shape[0] < 100]
    with ReadAhead(checkpoint, wanted) as reader:
        for tensor, part in [*first, *wanted]:  # out of turn, and in turn
            expected = checkpoint.read(tensor, part)
            assert mx.array_equal(reader.read(tensor, part), expected)


def test_one_slice_is_read_by_several_threads(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the others: one alone would wait for ever."""
    together = threading.Barrier(readahead.READERS, timeout=20)
    preadv = os.preadv

    def read(*arguments: object) -> int:
        together.wait()
        return preadv(*arguments)  # type: ignore[arg-type]

    size = 20 * 9000
    monkeypatch.setattr(readahead, "PART_BYTES", size // readahead.READERS)
    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(loader, "reading", lambda: None)  # its calls are not seen
    tensor, part = wanted_of(checkpoint)[-1]
    with ReadAhead(checkpoint, [(tensor, part)]) as reader:
        assert reader.read(tensor, part).nbytes == size


def test_how_far_ahead(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the slice that is waited for, at most one is begun beyond the limit."""
    begun: list[int] = []

    def counted(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
        array, memory = allocate(shape, dtype)
        begun.append(array.nbytes)
        return array, memory

    monkeypatch.setattr(readahead, "allocate", counted)
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 1000)
    tensor = checkpoint.tensors["a"].tensor
    wanted = [
        (tensor, Slice(tensor.shape, 0, Spans([(i, i + 10)]))) for i in range(100)
    ]
    with ReadAhead(checkpoint, wanted) as reader:
        for number, (tensor, part) in enumerate(wanted, 1):
            reader.read(tensor, part)
            assert sum(begun) <= number * 500 + 1000


@pytest.mark.usefixtures("language")
def test_an_error_is_that_of_its_slice(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "PART_BYTES", 10_000)
    wanted = wanted_of(checkpoint)
    by_place = sorted(wanted, key=lambda pair: checkpoint.position(pair[0]))
    *before, (tensor, _) = by_place
    by_place[-1] = tensor, Slice(tensor.shape)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with ReadAhead(checkpoint, by_place) as reader:
        for pair in before:
            reader.read(*pair)
        with pytest.raises(OSError, match="the file ends at byte"):
            reader.read(*by_place[-1])

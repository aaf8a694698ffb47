"""What a file says of itself, and from which of several files a tensor is read."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtp.checkpoint.headers import (
    Checkpoint,
    Header,
    Index,
    absent_files,
    header_of,
    parse_index,
    read_header,
    tensor_files,
    tensors_in,
    unlisted,
    unsettled,
    weight_files,
)
from mlxtp.checkpoint.tensors import StoredTensor, dtype_of, item_bits, kind_of
from mlxtp.partition.spans import Slice

pytestmark = pytest.mark.once

# Which files hold weights: what is there, what the index says, what is read.
WEIGHTS: list[tuple[list[str], dict[str, str], list[str]]] = [
    (["model.safetensors", "config.json"], {}, ["model.safetensors"]),
    (["model-2.safetensors", "model.safetensors"], {"a": "model-3.safetensors"},
     ["model-2.safetensors", "model.safetensors"]),
    (["model.safetensors", "other.safetensors"], {"a": "other.safetensors"},
     ["model.safetensors"]),
    (["b.safetensors", "a.safetensors"], {"x": "a.safetensors", "y": "c.safetensors"},
     ["a.safetensors"]),
    (["config.json"], {"x": "../model.safetensors", "y": "sub/model.safetensors"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("there", "index", "read"), WEIGHTS)
def test_which_files(there: list[str], index: dict[str, str], read: list[str]) -> None:
    assert weight_files(there, index) == read


def header(file: str, kinds: dict[str, str]) -> Header:
    """A header of tensors of four elements, by name and type."""
    tensors = {
        n: StoredTensor.whole(n, k, [4], Path(file), 0) for n, k in kinds.items()
    }
    return Header(b"", tensors)


# Files with the types of their tensors, an index, and the copies that are equal to
# the tensor: which file of x is read, and which copies differ; or what is said.
COPIES: list[tuple[list[str], str | None, str, str, set[str]]] = [
    (["F32"], None, "", "f0", set()),
    (["F32", "F32"], None, "f1", "f0", set()),
    (["F32", "F32", "F32"], None, "f1 f2", "f0", set()),
    (["F32", "F32"], "f1", "", "f1", {"f0"}),
    (["F32", "F32"], "f1", "f0", "f1", set()),
    (["F32", "F16"], "f0", "f1", "f0", {"f1"}),
    (["F32", "F32"], "gone", "f1", "f0", set()),
    (["F32", "F32"], None, "", "x is in f0 and in f1, and they differ", set()),
    (["F32", "F32", "F32"], None, "f1", "x is in f0 and in f2, and they", set()),
    (["F32", "F16"], None, "f1", "x is in f0 and in f1, and they differ", set()),
    (["F32", "F32"], "gone", "", "x is in f0 and in f1, and they differ", set()),
]


@pytest.mark.parametrize(("kinds", "named", "equal", "read", "different"), COPIES)
def test_which_copy(
    kinds: list[str], named: str | None, equal: str, read: str, different: set[str]
) -> None:
    headers = {
        f"f{i}": header(f"f{i}", {"x": kind, f"other {i}": "F32"})
        for i, kind in enumerate(kinds)
    }
    index = {} if named is None else {"x": named}
    compared = []

    def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
        compared.append(other.pieces[0].file.name)
        return compared[-1] in equal.split()

    if read not in headers:
        chosen, differing = tensor_files(headers, index, are_equal)
        checkpoint = Checkpoint(headers, tensors_in(headers, chosen), differing)
        assert unsettled(checkpoint, index)["x"].startswith(read)
        return
    files, differing = tensor_files(headers, index, are_equal, compare_all=True)
    assert files["x"] == read
    assert all(files[f"other {i}"] == f"f{i}" for i in range(len(kinds)))
    assert differing == {(file, "x") for file in different}
    compared.clear()
    chosen, differing = tensor_files(headers, index, are_equal)
    checkpoint = Checkpoint(headers, tensors_in(headers, chosen), differing)
    assert not unsettled(checkpoint, index)
    assert not compared or named != read  # where the index decides nothing is read


def test_what_an_index_says() -> None:
    said = parse_index(b'{"weight_map": {"a": "f", "b": 3}, "metadata": null}')
    assert said == Index({"a": "f"})
    said = parse_index(
        b'{"weight_map": {"a": "./f", "b": 3}, "metadata": {"total_size": 5}}'
    )
    assert said == Index({"a": "f"}, 5)
    for content in (b"", b"{", b"[]", b"{}", b'{"weight_map": ["a"]}', b"\xff"):
        assert parse_index(content) == Index()
    headers = {"f": header("f", {"a": "F32", "b": "F32"})}
    assert unlisted(headers, Index({"a": "f"})) == {"b"}
    assert unlisted(headers, Index({"a": "f"}, 32)) == {"b"}
    for stale in ({}, {"a": "f", "c": "f"}, {"a": "g"}):
        assert unlisted(headers, Index(stale)) == set()
    assert unlisted(headers, Index({"a": "f"}, 16)) == {"b"}  # those of `a` alone
    assert unlisted(headers, Index({"a": "f"}, 17)) == set()  # not of these files
    index = {"a": "f", "c": "g", "d": "f", "e": "h"}
    assert absent_files(["a", "c", "d", "x"], headers, index) == ["g"]


# Every type that safetensors 0.8 has, and its bits.
KINDS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_types_are_those_of_mlx(kind: str, tmp_path: Path) -> None:
    """What MLX reads is read alike; others have their bytes."""
    file, count = tmp_path / "model.safetensors", 8 * KINDS[kind] // 8
    write(file, {"x": {"dtype": kind, "shape": [8], "data_offsets": [0, count]}}, count)
    assert item_bits(kind) == KINDS[kind]
    stored = Checkpoint.of_files([file]).tensors["x"]
    whole = Slice((8,))
    data = b"".join(block.tobytes() for block in stored.blocks(whole))
    assert data == file.read_bytes()[-count:]
    try:
        array: Any = mx.load(str(file))["x"]  # type: ignore[call-overload]
    except RuntimeError:
        assert not stored.tensor.is_readable
        return
    read = stored.read(whole)
    assert read.dtype == array.dtype == dtype_of(kind)
    assert read.view(mx.uint8).tolist() == array.view(mx.uint8).tolist()
    assert dtype_of(kind_of(array.dtype)) == array.dtype


def write(file: Path, entries: dict[str, Any], size: int) -> None:
    text = json.dumps(entries).encode()
    data = bytes(i % 2 for i in range(size))
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN: dict[str, tuple[dict[str, Any], int]] = {
    "cut short": ({"a": A}, 4),
    "longer": ({"a": A}, 12),
    "a gap": ({"a": A, "b": {**A, "data_offsets": [12, 20]}}, 20),
    "an overlap": ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, 12),
    "another size": ({"a": {**A, "shape": [3]}}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "no type": ({"a": {**A, "dtype": "X"}}, 8),
    "no numbers": ({"a": {**A, "shape": ["2"]}}, 8),
    "no entry": ({"a": 3}, 8),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_are_refused(fault: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write(file, *BROKEN[fault])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is no whole safet"):
        read_header(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to("nothing")
    with pytest.raises(ValueError, match="is not there"):
        read_header(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_header(file)
    for content in (b"", b"1234", b"\xff" * 8, b"\x02" + bytes(7) + b"[]"):
        with pytest.raises(ValueError, match="no whole safetensors file"):
            header_of(file, content, len(content))

"""A checkpoint's tensors, and what its safetensors files say of themselves."""

import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.tensors import StoredTensor, Tensor, item_bits
from mlxtp.partition.spans import Slice

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
# As safetensors has it: no file's header is longer.
MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; tensors in the order they lie in.

    `beginning` are the file's bytes before the first tensor. `sha256` is what the hub
    says that the whole file hashes to.
    """

    beginning: bytes
    tensors: dict[str, StoredTensor]
    sha256: str | None = None


@dataclass(frozen=True)
class Index:
    """What an index says: which tensor is in which file, and all files' bytes."""

    files: dict[str, str] = field(default_factory=dict)
    total_bytes: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, and where on this machine they lie.

    `headers` are those of its files, or, where it was cut, of the files that it had,
    with all that is in them. `tensors` are read: of copies in several files, one.
    `different` are copies that are known to differ from it, by file and name.
    """

    headers: Mapping[str, Header]
    tensors: Mapping[str, StoredTensor]
    different: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of_files(
        cls, files: Iterable[Path], index: Mapping[str, str] | None = None
    ) -> "Checkpoint":
        """Read the headers of `files`; of copies, what `tensor_files` chooses.

        Raises: ValueError, with the file, if one is missing, cut short or broken.
        """
        headers = {file.name: read_header(file) for file in files}
        chosen, different = tensor_files(headers, index or {}, equal_on_disk)
        return cls(headers, tensors_in(headers, chosen), different)

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a folder's weights. Errors as in `of_files`."""
        index = index_of(folder).files
        if not (files := files_of(folder)):
            raise ValueError(no_weights(str(folder), index))
        return cls.of_files(files, index)

    def read(self, tensor: Tensor, part: Slice) -> mx.array:
        """Read a slice of one of the tensors. Errors as in `StoredTensor.read`."""
        return self.tensors[tensor.name].read(part)

    def position(self, tensor: Tensor) -> tuple[str, int]:
        """The file and the byte where a tensor begins: the order to read tensors in.

        Those of which nothing is here come last.
        """
        pieces = self.tensors[tensor.name].pieces
        return (str(pieces[0].file), pieces[0].offset) if pieces else ("~", 0)

    def renamed(self, pattern: str) -> "Checkpoint":
        """The same tensors with other names: `pattern` with the name in place of {}."""
        tensors = {}
        for name, stored in self.tensors.items():
            new = pattern.format(name)
            tensors[new] = StoredTensor(replace(stored.tensor, name=new), stored.pieces)
        return Checkpoint({}, tensors)

    def updated(self, other: "Checkpoint") -> "Checkpoint":
        """The same with the tensors of `other`, as they lie there."""
        return Checkpoint(
            {**self.headers, **other.headers},
            {**self.tensors, **other.tensors},
            self.different | other.different,
        )


def weight_files(there: Iterable[str], index: Mapping[str, str]) -> list[str]:
    """Which of the files that are there hold weights.

    model*.safetensors, as for mlx-lm, whatever the index says; where there are none,
    the files that the index names.
    """
    there = set(there)
    usual = fnmatch.filter(there, WEIGHTS)
    return sorted(usual or there.intersection(index.values()))


def files_of(folder: Path) -> list[Path]:
    """The files in a folder that hold weights."""
    names = weight_files(os.listdir(folder), index_of(folder).files)
    return [folder / name for name in names]


def no_weights(where: str, index: Mapping[str, str]) -> str:
    """What an error says of a place without weights."""
    line = f"there is no {WEIGHTS} in {where}"
    if not index:
        return line
    named = sorted(set(index.values()))
    line += f", and its index names {', '.join(named)}"
    if any(Path(file).name == file for file in named):
        return f"{line}: fetch the checkpoint again"
    return f"{line}: weights are read from the folder itself alone"


def tensor_files(
    headers: Mapping[str, Header],
    index: Mapping[str, str],
    are_equal: Callable[[StoredTensor, StoredTensor], bool],
    *,
    compare_all: bool = False,
) -> tuple[dict[str, str], frozenset[tuple[str, str]]]:
    """Decide from which of the files each tensor is read: the rule for copies.

    It is the file that the index names, or the first one where that does not have it:
    `unsettled` says which of these a model cannot use. `are_equal` compares the bytes
    of two tensors of the same type and shape; it is asked only where it matters, or
    with `compare_all` of every copy.

    Returns: the file of each tensor; the file and name of copies that are known to
        differ from it.
    """
    holders: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header.tensors:
            holders.setdefault(name, []).append(file)
    chosen: dict[str, str] = {}
    different: set[tuple[str, str]] = set()
    for name, files in holders.items():
        named = index.get(name)
        first = chosen[name] = named if named in files else files[0]
        for file in files:
            if file == first or (first == named and not compare_all):
                continue
            one, other = headers[first].tensors[name], headers[file].tensors[name]
            if one.tensor != other.tensor or not are_equal(one, other):
                different.add((file, name))
    return chosen, frozenset(different)


def unsettled(checkpoint: Checkpoint, index: Mapping[str, str]) -> dict[str, str]:
    """Tensors whose copies differ while the index does not say which is right.

    Returns: by name, what an error says of it.
    """
    result = {}
    for file, name in sorted(checkpoint.different):
        holders = [f for f, h in checkpoint.headers.items() if name in h.tensors]
        if index.get(name) not in holders:
            result[name] = (
                f"{name} is in {holders[0]} and in {file}, and they differ; no {INDEX} "
                "says which is right: remove one of the two"
            )
    return result


def tensors_in(
    headers: Mapping[str, Header], chosen: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """The tensors of several files by name, each from the file chosen for it."""
    return {name: headers[file].tensors[name] for name, file in chosen.items()}


def equal_on_disk(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of the same type and shape have the same bytes.

    Raises: OSError if a file cannot be read.
    """
    whole = Slice(one.tensor.shape)
    blocks = zip(one.blocks(whole), other.blocks(whole), strict=True)
    return all(np.array_equal(a, b) for a, b in blocks)


def index_of(folder: Path) -> Index:
    """Read the index in a folder: one that says nothing where there is none."""
    try:
        return parse_index((folder / INDEX).read_bytes())
    except OSError:
        return Index()


def parse_index(content: bytes) -> Index:
    """Read an index: what is none says nothing.

    The files themselves say what they hold, so a broken index is no reason to stop.
    """
    try:
        index = json.loads(content)
        files = {
            name: os.path.normpath(file)
            for name, file in index["weight_map"].items()
            if isinstance(file, str)
        }
        return Index(files, (index.get("metadata") or {}).get("total_size"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Index()


def unlisted(headers: Mapping[str, Header], index: Index) -> set[str]:
    """Tensors that are not the model's by the word of an index which can be trusted.

    It can where every tensor that it names is in the file that it says, and where the
    bytes that it says are those of these tensors, or of all in the files.
    """
    everything = [t for header in headers.values() for t in header.tensors.values()]
    listed = [
        headers[file].tensors[name]
        for name, file in index.files.items()
        if file in headers and name in headers[file].tensors
    ]
    totals = (None, _bytes_of(listed), _bytes_of(everything))
    is_right = len(listed) == len(index.files) and index.total_bytes in totals
    if not index.files or not is_right:
        return set()
    return {stored.tensor.name for stored in everything} - index.files.keys()


def _bytes_of(tensors: Iterable[StoredTensor]) -> int:
    return sum(t.tensor.bytes_of(Slice(t.tensor.shape)) for t in tensors)


def absent_files(
    names: Iterable[str], headers: Mapping[str, Header], index: Mapping[str, str]
) -> list[str]:
    """The files that should have tensors, as the index says, and that are not there."""
    return sorted({index[n] for n in names if n in index} - headers.keys())


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file.

    Raises: ValueError if the file is missing, cut short or broken.
    """
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(8)
            beginning += opened.read(header_bytes(beginning) - 8)
            size = os.fstat(opened.fileno()).st_size
    except FileNotFoundError:
        raise ValueError(f"{file} is not there") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return header_of(file, beginning, size)


def header_bytes(beginning: bytes) -> int:
    """How long a file's header is, by its first 8 bytes; 8 where it cannot be."""
    length = int.from_bytes(beginning[:8], "little")
    return 8 + (length if length <= MOST_HEADER_BYTES else 0)


def header_of(
    file: Path, beginning: bytes, size: int | None = None, sha256: str | None = None
) -> Header:
    """Read the `beginning` of a file: all before the first tensor.

    Raises: ValueError if it is no header, or tells of a file that has not `size` bytes.
    """
    try:
        if len(beginning) <= 8:
            raise ValueError("it has no header")
        content = json.loads(beginning[8:].decode())
        content.pop("__metadata__", None)
        order = sorted(content.items(), key=lambda item: item[1]["data_offsets"])
        tensors, end = {}, 0
        for name, entry in order:
            kind, shape, (start, stop) = (
                entry[key] for key in ("dtype", "shape", "data_offsets")
            )
            where = len(beginning) + start
            tensors[name] = StoredTensor.whole(name, kind, shape, file, where)
            if start != end or (stop - start) * 8 != prod(shape) * item_bits(kind):
                raise ValueError(f"{name} is not as long as it should be")
            end = stop
        if size not in (None, len(beginning) + end):
            raise ValueError(f"it has {size} bytes, not {len(beginning) + end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error})") from None
    return Header(beginning, tensors, sha256)

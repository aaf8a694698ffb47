"""A checkpoint's tensors, and what its safetensors files say of themselves."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata
from safetensors import SafetensorError, safe_open

from mlxtp.checkpoint.tensors import DTYPES, StoredTensor, Tensor
from mlxtp.partition.spans import Slice

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; tensors in the order they lie in.

    `sha256` is what the hub says that the whole file hashes to.
    """

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]
    sha256: str | None = None

    @property
    def data_start(self) -> int:
        """Bytes before the first tensor."""
        return min((t.pieces[0].offset for t in self.tensors.values()), default=0)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, and where on this machine they lie.

    `headers` are those of its files, or, where it was cut, of the files that it had.
    """

    headers: Mapping[str, Header]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def of_files(cls, files: Iterable[Path]) -> "Checkpoint":
        """Read the headers of `files`.

        Raises: ValueError, with the file, if one is missing, cut short or broken.
        """
        headers = {file.name: read_header(file) for file in files}
        return cls(headers, tensors_of(headers))

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        """Read the headers of the files that an index names, or of model*.safetensors.

        Raises: ValueError, with the file, if one is missing, cut short or broken, or
            is not what the index says.
        """
        index = folder / INDEX
        if not index.exists():
            files = sorted(folder.glob(WEIGHTS))
            if not files:
                raise ValueError(f"no {WEIGHTS} in {folder}")
            return cls.of_files(files)
        promised = weight_map(index.read_bytes(), str(index))
        names = sorted(set(promised.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{index} names {', '.join(missing)}, which is not in {folder}; "
                "fetch the checkpoint again"
            )
        checkpoint = cls.of_files([folder / name for name in names])
        for name, file in promised.items():
            if name not in checkpoint.tensors:
                raise ValueError(f"{index} promises {name} in {file}: it is not there")
        return checkpoint

    def read(self, tensor: Tensor, part: Slice) -> mx.array:
        """Read a slice of one of the tensors. Errors as in `StoredTensor.read`."""
        return self.tensors[tensor.name].read(part)

    def position(self, tensor: Tensor) -> tuple[str, int]:
        """The file and the byte where a tensor begins: the order to read tensors in.

        Those of which nothing is here come last.
        """
        pieces = self.tensors[tensor.name].pieces
        return (str(pieces[0].file), pieces[0].offset) if pieces else ("~", 0)

    def missing(self, slices: Mapping[Tensor, Slice]) -> dict[Tensor, Slice]:
        """What of `slices` is not here, by tensor; others are left out."""
        missing = {
            tensor: self.tensors[tensor.name].missing(part)
            for tensor, part in slices.items()
        }
        return {tensor: part for tensor, part in missing.items() if part}

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
            {**self.headers, **other.headers}, {**self.tensors, **other.tensors}
        )


def tensors_of(headers: Mapping[str, Header]) -> dict[str, StoredTensor]:
    """The tensors of several files, by name: of copies, that of the last file."""
    return {
        name: stored
        for header in headers.values()
        for name, stored in header.tensors.items()
    }


def weight_map(index: bytes, where: str) -> dict[str, str]:
    """Read which tensor is in which file, as an index says.

    `where` is what an error calls the index.

    Raises: ValueError if it says nothing of the kind.
    """
    try:
        files = json.loads(index)["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is no index of safetensors files: {error!r}"
        ) from None


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file.

    Raises: ValueError if the file is missing, cut short or broken.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass  # checks the header and that the file is as long as it says
        metadata = parse_local_safetensors_file_metadata(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is not there") from None
    except (SafetensorError, SafetensorsParsingError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); fetch it again"
        ) from None
    return header_of(file, metadata, file.stat().st_size)


def header_of(
    file: Path, parsed: SafetensorsFileMetadata, size: int, sha256: str | None = None
) -> Header:
    """Take what huggingface-hub has read of a file of `size` bytes.

    Raises: ValueError if MLX does not know a type, or the sizes do not fit together.
    """
    order = sorted(parsed.tensors.items(), key=lambda item: item[1].data_offsets)
    # Nothing lies behind the tensors.
    data_start = size - max((t.data_offsets[1] for _, t in order), default=0)
    tensors = {}
    for name, info in order:
        if info.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is of type {info.dtype}, unknown to MLX")
        begin, end = info.data_offsets
        stored = StoredTensor.whole(
            name, info.dtype, info.shape, file, data_start + begin
        )
        item_bytes = stored.tensor.dtype.size
        if data_start < 8 or end - begin != prod(info.shape) * item_bytes:
            raise ValueError(f"{file} is no whole safetensors file; fetch it again")
        tensors[name] = stored
    return Header(parsed.metadata, tensors, sha256)

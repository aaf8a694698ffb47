"""The tensors of a checkpoint: what its safetensors files say of themselves."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata
from safetensors import SafetensorError, safe_open

from mlxtp.checkpoint.tensors import DTYPES, Tensor, whole_tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; tensors in the order they lie in.

    `sha256` is what the hub says that the whole file hashes to.
    """

    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    sha256: str | None = None

    @property
    def data_start(self) -> int:
        """Bytes before the first tensor."""
        return min((t.pieces[0].offset for t in self.tensors.values()), default=0)


class Checkpoint:
    """The tensors of a checkpoint's safetensors files, by name."""

    def __init__(self, files: list[Path]) -> None:
        """Read the headers of `files`.

        Raises: ValueError, with the file, if one is missing, cut short or broken.
        """
        self.headers = {file.name: read_header(file) for file in files}
        self.tensors = {
            name: tensor
            for header in self.headers.values()
            for name, tensor in header.tensors.items()
        }

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`: what its index names, or model*.safetensors."""
        index = folder / INDEX
        if not index.exists():
            files = sorted(folder.glob(WEIGHTS))
            if not files:
                raise ValueError(f"no {WEIGHTS} in {folder}")
            return cls(files)
        promised = weight_map(index.read_bytes(), str(index))
        names = sorted(set(promised.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{index} names {', '.join(missing)}, which is not in {folder}; "
                "fetch the checkpoint again"
            )
        checkpoint = cls([folder / name for name in names])
        for name, file in promised.items():
            if name not in checkpoint.tensors:
                raise ValueError(f"{index} promises {name} in {file}: it is not there")
        return checkpoint


def weight_map(index: bytes, where: str) -> dict[str, str]:
    """Which tensor is in which file, as an index says.

    Raises: ValueError if it says nothing of the kind.
    """
    try:
        found = json.loads(index)["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
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
        info = parse_local_safetensors_file_metadata(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is not there") from None
    except (SafetensorError, SafetensorsParsingError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); fetch it again"
        ) from None
    return header_of(file, info, file.stat().st_size)


def header_of(
    file: Path, info: SafetensorsFileMetadata, size: int, sha256: str | None = None
) -> Header:
    """What huggingface-hub has read of a file of `size` bytes.

    Raises: ValueError if MLX does not know a type, or the sizes do not fit together.
    """
    order = sorted(info.tensors.items(), key=lambda item: item[1].data_offsets)
    # Nothing lies behind the tensors.
    data_start = size - max((t.data_offsets[1] for _, t in order), default=0)
    tensors = {}
    for name, it in order:
        if it.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is of type {it.dtype}, unknown to MLX")
        begin, end = it.data_offsets
        tensor = whole_tensor(name, it.dtype, it.shape, file, data_start + begin)
        if data_start < 8 or end - begin != prod(it.shape) * tensor.dtype.size:
            raise ValueError(f"{file} is no whole safetensors file; fetch it again")
        tensors[name] = tensor
    return Header(info.metadata, tensors, sha256)

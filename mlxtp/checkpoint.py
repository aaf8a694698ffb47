"""Names and slices in, arrays out: reads those bytes of a checkpoint and no others."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from mlxtp.partition import Slice

# What MLX makes of the types of a safetensors file.
DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "F8_E4M3": mx.uint8,
}

# Pieces that lie closer together than a page are read with what is between them:
# the disk reads the page anyway.
PAGE_BYTES = 4096
# The most that is read at once into memory which is not the array's own.
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Tensor:
    """Where an array lies: `offset` in bytes from the start of `file`."""

    file: Path
    offset: int
    dtype: mx.Dtype
    shape: tuple[int, ...]

    def read(self, part: Slice) -> mx.array:
        return read(self, part)

    def place(self) -> tuple[str, int]:
        """The file and the byte where it begins."""
        return str(self.file), self.offset


class Checkpoint:
    """The tensors of a checkpoint's safetensors files, by name."""

    def __init__(self, files: list[Path]) -> None:
        """Read the headers of `files`.

        Raises: ValueError, with the file, if one is missing, cut short or broken.
        """
        self.tensors: dict[str, Tensor] = {}
        for file in files:
            self.tensors.update(_header(file))

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`: what its index names, or model*.safetensors."""
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            files = sorted(folder.glob("model*.safetensors"))
            if not files:
                raise ValueError(f"no model*.safetensors in {folder}")
            return cls(files)
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is no index of safetensors files: {error!r}"
            ) from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{index} names {', '.join(missing)}, which is not in {folder}; "
                "fetch the checkpoint again"
            )
        checkpoint = cls([folder / name for name in names])
        for name, file in weight_map.items():
            if name not in checkpoint.tensors:
                raise ValueError(f"{index} promises {name} in {file}: it is not there")
        return checkpoint


def read(tensor: Tensor, part: Slice) -> mx.array:
    """Read a slice of a tensor, its bytes straight into the memory of the array.

    Raises: OSError if the file ends early or cannot be read.
    """
    raw = mx.empty((part.size * tensor.dtype.size,), mx.uint8)
    mx.eval(raw)
    if raw.size:
        with open(tensor.file, "rb", buffering=0) as file:
            _read_into(np.asarray(raw), file.fileno(), tensor, part)
    return raw.view(tensor.dtype).reshape(part.shape)


def _header(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="numpy"):
            pass  # checks the header and that the file is as long as it says
        info = parse_local_safetensors_file_metadata(file).tensors
        with open(file, "rb") as opened:
            data_start = 8 + int.from_bytes(opened.read(8), "little")
    except FileNotFoundError:
        raise ValueError(f"{file} is not there") from None
    except (SafetensorError, SafetensorsParsingError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); fetch it again"
        ) from None
    unknown = [name for name, tensor in info.items() if tensor.dtype not in DTYPES]
    if unknown:
        kind = info[unknown[0]].dtype
        raise ValueError(f"{file}: {unknown[0]} is of type {kind}, unknown to MLX")
    return {
        name: Tensor(
            file,
            data_start + tensor.data_offsets[0],
            DTYPES[tensor.dtype],
            tuple(tensor.shape),
        )
        for name, tensor in info.items()
    }


def _read_into(memory: np.ndarray, fd: int, tensor: Tensor, part: Slice) -> None:
    """Fill `memory` (bytes) with the slice `part` of `tensor`.

    Seen from the cut axis a tensor is a stack of `rows`, each with the spans at the
    same places.
    """
    if part.shape == tensor.shape:
        return _pread(fd, memory, tensor.offset)
    assert part.axis is not None
    rows = prod(tensor.shape[: part.axis])
    item = prod(tensor.shape[part.axis + 1 :]) * tensor.dtype.size
    row = item * tensor.shape[part.axis]
    pieces = [(start * item, stop * item) for start, stop in part.spans if start < stop]
    into = memory.reshape(rows, -1)
    gap = row - into.shape[1]
    if rows == 1 or gap >= PAGE_BYTES:
        for number in range(rows):
            filled = 0
            for start, stop in pieces:
                target = into[number, filled : filled + stop - start]
                _pread(fd, target, tensor.offset + number * row + start)
                filled += stop - start
        return
    block = np.empty((max(1, BLOCK_BYTES // row), row), np.uint8)
    first, last = pieces[0][0], pieces[-1][1]
    for number in range(0, rows, len(block)):
        some = block[: rows - number]
        # From the first piece of the first row to the last piece of the last.
        flat = some.reshape(-1)[first : some.size - (row - last)]
        _pread(fd, flat, tensor.offset + number * row + first)
        filled = 0
        for start, stop in pieces:
            into[number : number + len(some), filled : filled + stop - start] = some[
                :, start:stop
            ]
            filled += stop - start


def _pread(fd: int, target: np.ndarray, offset: int) -> None:
    view = target.data
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise OSError(f"the file ends at byte {offset}, inside a tensor")
        view, offset = view[count:], offset + count

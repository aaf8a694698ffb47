"""Cut checkpoints are written, and put together again, with little memory."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from typing import Any

from mlxtp.checkpoint.cut import (
    Origin,
    Shard,
    open_cut,
    shards,
    small_files,
    sync,
    write_manifest,
)
from mlxtp.checkpoint.headers import Checkpoint, Header, read_header
from mlxtp.checkpoint.progress import Advance, ignore
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.checkpoint.verify import sha256
from mlxtp.partition.spans import Slice


def write(
    folder: Path,
    shard: Shard,
    origin: Origin,
    checkpoint: Checkpoint,
    slices: Mapping[str, Mapping[Tensor, Slice]],
    advance: Advance = ignore,
) -> Path:
    """Cut the `slices` of the tensors of each file of a checkpoint on this machine.

    In memory is a block of half a MB at a time. What was there before stays until all
    of it is written.

    Returns: the folder of the shard.

    Raises: OSError if a file cannot be read or written.
    """
    final = folder / shard.folder
    partial = folder / f"{shard.folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files = {}
    for file, of_file in slices.items():
        wanted = {tensor: part for tensor, part in of_file.items() if part.size}
        if wanted:
            header = checkpoint.headers[file]
            beginning, _ = layout(wanted)
            hashes = _write_file(partial / file, beginning, header, wanted, advance)
            files[file] = (wanted, hashes)
    write_manifest(partial, shard, origin, files)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def seal(
    partial: Path,
    shard: Shard,
    origin: Origin,
    files: Mapping[str, Mapping[Tensor, Slice]],
    spent: Iterable[str] = (),
) -> None:
    """Make a folder of slices, in which `files` are written, one that counts.

    Files named in `spent` are removed.
    """

    def hashes(file: str) -> dict[str, str]:
        header = read_header(partial / file)
        return {
            name: sha256(stored, Slice(stored.tensor.shape))
            for name, stored in header.tensors.items()
        }

    with ThreadPoolExecutor() as pool:
        hashed = dict(zip(files, pool.map(hashes, files), strict=True))
    written = {file: (slices, hashed[file]) for file, slices in files.items()}
    write_manifest(partial, shard, origin, written)
    for name in spent:
        (partial / name).unlink()
    final = partial.with_suffix("")
    others = (partial.with_name(f"{final.name}+{n}") for n in count(1))
    partial.rename(next(path for path in chain([final], others) if not path.exists()))


def rest(
    origin: Origin, slices: Iterable[Mapping[str, Slice]]
) -> dict[str, dict[Tensor, Slice]]:
    """What no rank has, by file; copies that nobody reads are among it.

    `slices` gives for each rank its slices of tensors, by name.
    """
    held: dict[str, Slice] = {}
    for of_rank in slices:
        for name, part in of_rank.items():
            held[name] = held.get(name, part).union(part)
    left: dict[str, Slice] = {}
    for name, stored in origin.tensors.items():
        whole, of_ranks = Slice(stored.tensor.shape), held.get(name)
        if of_ranks is None:
            left[name] = whole
        elif of_ranks.axis is not None:
            spans = whole.on(of_ranks.axis).difference(of_ranks.spans)
            left[name] = Slice(whole.full_shape, of_ranks.axis, spans)
    result = origin.by_file({name: part for name, part in left.items() if part.size})
    for file, name in sorted(origin.different):
        tensor = origin.headers[file].tensors[name].tensor
        result[file][tensor] = Slice(tensor.shape)
    return result


def join(folder: Path, output: Path, advance: Advance = ignore) -> None:
    """Put the whole checkpoint together again, in the files that it had.

    Raises: ValueError if slices are missing, or `output` is not empty.
    """
    checkpoint = open_cut(folder)
    if absent := absent_bytes(checkpoint):
        here = ", ".join(shard.folder for shard in shards(folder)) or "nothing"
        raise ValueError(
            f"{absent:,} bytes of the checkpoint are not in {folder}: there is {here}"
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty")
    output.mkdir(parents=True, exist_ok=True)
    for name, content in small_files(folder).items():
        (output / name).write_bytes(content)
    for file, header in checkpoint.headers.items():
        whole = {s.tensor: Slice(s.tensor.shape) for s in header.tensors.values()}
        _write_file(output / file, header.beginning, header, whole, advance)


def absent_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's files that are not on this machine."""
    return sum(
        stored.tensor.bytes_of(missing)
        for header in checkpoint.headers.values()
        for stored in header.tensors.values()
        if (missing := stored.missing(Slice(stored.tensor.shape)))
    )


def layout(slices: Mapping[Tensor, Slice]) -> tuple[bytes, dict[str, int]]:
    """Lay out a safetensors file of slices.

    Returns: the bytes before the first slice, and the offset of each in the file.
    """
    header: dict[str, Any] = {}
    begins, end = {}, 0
    for tensor, part in slices.items():
        begin, end = end, end + tensor.bytes_of(part)
        begins[tensor.name] = begin
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": part.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    offsets = {name: data_start + begin for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, offsets


def _write_file(
    file: Path,
    beginning: bytes,
    source: Header,
    slices: Mapping[Tensor, Slice],
    advance: Advance,
) -> dict[str, str]:
    """Write a file of slices of what `source` has, block by block; each one's hash."""
    hashes = {}
    with open(file, "wb") as out:
        out.write(beginning)
        for tensor, part in slices.items():
            digest = hashlib.sha256()
            for block in source.tensors[tensor.name].blocks(part):
                out.write(block.data)
                digest.update(block.data)
                advance(block.size)
            hashes[tensor.name] = digest.hexdigest()
        out.flush()
        sync(out.fileno())
    return hashes

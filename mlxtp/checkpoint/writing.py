"""Cut checkpoints are written, and put together again, with little memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from typing import Any

from mlxtp.checkpoint.cut import (
    Origin,
    Shard,
    bytes_of,
    lacking,
    open_cut,
    origin_of,
    shards,
    small_files,
    write_manifest,
)
from mlxtp.checkpoint.headers import read_header
from mlxtp.checkpoint.tensors import Tensor, blocks
from mlxtp.checkpoint.verify import Advance, sha256
from mlxtp.partition.spans import Slice


def write(
    folder: Path,
    shard: Shard,
    origin: Origin,
    slices: Mapping[str, Slice],
    advance: Advance = lambda _: None,
) -> Path:
    """Cut the `slices` of the tensors of `origin`, which lie on this machine.

    In memory is a block of a few MB at a time. What was there before stays until all
    of it is written.

    Returns: the folder of the shard.
    """
    final = folder / shard.folder
    partial = folder / f"{shard.folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files = {}
    for name, header in origin.headers.items():
        own = {t: slices[t.name] for t in header.tensors.values() if t.name in slices}
        mine = {tensor: part for tensor, part in own.items() if part.size}
        if mine:
            hashes = _write_file(partial / name, mine, advance)
            files[name] = (mine, hashes)
    write_manifest(partial, shard, origin, files)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def seal(
    partial: Path,
    shard: Shard,
    origin: Origin,
    files: Mapping[str, Mapping[Tensor, Slice]],
) -> None:
    """Make a folder of slices, in which `files` are written, one that counts."""

    def hashes(file: str) -> dict[str, str]:
        header = read_header(partial / file)
        return {
            name: sha256(tensor, Slice(tensor.shape))
            for name, tensor in header.tensors.items()
        }

    with ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(hashes, files), strict=True))
    done = {file: (slices, found[file]) for file, slices in files.items()}
    write_manifest(partial, shard, origin, done)
    final = partial.with_suffix("")
    others = (partial.with_name(f"{final.name}+{n}") for n in count(1))
    partial.rename(next(path for path in chain([final], others) if not path.exists()))


def rest(origin: Origin, slices: Iterable[Mapping[str, Slice]]) -> dict[str, Slice]:
    """What no rank has, by tensor."""
    held: dict[str, Slice] = {}
    for of_rank in slices:
        for name, part in of_rank.items():
            held[name] = held.get(name, part).union(part)
    result = {}
    for header in origin.headers.values():
        for name, tensor in header.tensors.items():
            whole, mine = Slice(tensor.shape), held.get(name)
            if mine is None:
                result[name] = whole
            elif mine.axis is not None:
                gone = whole.on(mine.axis).difference(mine.spans)
                result[name] = Slice(tensor.shape, mine.axis, gone)
    return {name: part for name, part in result.items() if part.size}


def join(folder: Path, output: Path, advance: Advance = lambda _: None) -> None:
    """Put the whole checkpoint together again, in the files that it had.

    Raises: ValueError if slices are missing, or `output` is not empty.
    """
    origin, tensors = origin_of(folder), open_cut(folder)
    absent = bytes_of(lacking({t: Slice(t.shape) for t in tensors.values()}))
    if absent:
        here = ", ".join(shard.folder for shard in shards(folder)) or "nothing"
        raise ValueError(
            f"{absent:,} bytes of the checkpoint are not in {folder}: there is {here}"
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty")
    output.mkdir(parents=True, exist_ok=True)
    for file, content in small_files(folder).items():
        (output / file).write_bytes(content)
    for name, header in origin.headers.items():
        whole = {tensors[it.name]: Slice(it.shape) for it in header.tensors.values()}
        _write_file(output / name, whole, advance, header.metadata)


def layout(
    slices: Mapping[Tensor, Slice], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file of slices, and where each will lie."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    places, end = {}, 0
    for tensor, part in slices.items():
        begin, end = end, end + part.size * tensor.dtype.size
        places[tensor.name] = begin
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": part.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    where = {name: begin + place for name, place in places.items()}
    return len(text).to_bytes(8, "little") + text, where


def _write_file(
    file: Path,
    slices: Mapping[Tensor, Slice],
    advance: Advance,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write a safetensors file of slices, block by block; the hash of each."""
    hashes = {}
    with open(file, "wb") as out:
        out.write(layout(slices, metadata)[0])
        for tensor, part in slices.items():
            digest = hashlib.sha256()
            for block in blocks(tensor, part):
                out.write(block.data)
                digest.update(block.data)
                advance(block.size)
            hashes[tensor.name] = digest.hexdigest()
        out.flush()
        os.fsync(out.fileno())
    return hashes

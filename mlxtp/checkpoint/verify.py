"""Whether slices are as they were written: their hashes."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlxtp.checkpoint.cut import (
    MANIFEST,
    manifest_of,
    open_cut,
    rank_folders,
    stamp,
    write_json,
)
from mlxtp.checkpoint.headers import read_header
from mlxtp.checkpoint.tensors import Tensor, blocks
from mlxtp.partition.spans import Slice

Advance = Callable[[int], object]  # told of bytes as they are done


def sha256(tensor: Tensor, part: Slice, advance: Advance = lambda _: None) -> str:
    digest = hashlib.sha256()
    for block in blocks(tensor, part):
        digest.update(block.data)
        advance(block.size)
    return digest.hexdigest()


def verify(folder: Path, advance: Advance = lambda _: None) -> list[str]:
    """Compare every slice in `folder` with its hash: what is wrong, a line each."""
    tensors = open_cut(folder)
    checks = [
        (file, name, tensors[name], it)
        for part in rank_folders(folder)
        for file, said in manifest_of(part)["files"].items()
        for name, it in said["slices"].items()
        for file in [part / file]
    ]

    def fault(check: tuple[Path, str, Tensor, dict[str, Any]]) -> str | None:
        file, name, tensor, it = check
        piece = next(p for p in tensor.pieces if p.file == file)
        alone = Tensor(name, tensor.kind, tensor.shape, (piece,))
        wrong = sha256(alone, piece.part, advance) != it["sha256"]
        return f"{file}: {name} has changed since it was written" if wrong else None

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(fault, checks) if line]


def drop_damaged(folder: Path) -> None:
    """Let go of files of slices that are not as they were written.

    A file whose size and time are those of its manifest is taken as it is.
    """
    for part in rank_folders(folder):
        manifest = manifest_of(part)
        kept = {
            file: it
            for file, it in manifest["files"].items()
            if _is_sound(part, file, it)
        }
        if kept != manifest["files"]:
            for file in manifest["files"].keys() - kept.keys():
                (part / file).unlink(missing_ok=True)
            write_json(part / MANIFEST, {**manifest, "files": kept})


def _is_sound(part: Path, file: str, said: dict[str, Any]) -> bool:
    """Whether a file is what its manifest says; if so, with the time that it has."""
    try:
        now = stamp(part / file)
        if now == said["stamp"]:
            return True
        tensors = read_header(part / file).tensors
    except (OSError, ValueError):
        return False
    said["stamp"] = now
    return all(
        name in tensors
        and sha256(tensors[name], Slice(tensors[name].shape)) == it["sha256"]
        for name, it in said["slices"].items()
    )

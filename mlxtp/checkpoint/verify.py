"""Whether slices are as they were written: their hashes."""

import hashlib
import logging
import shutil
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
from mlxtp.checkpoint.headers import Header, read_header
from mlxtp.checkpoint.progress import Advance, ignore
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.partition.spans import Slice

logger = logging.getLogger(__name__)


def sha256(stored: StoredTensor, part: Slice, advance: Advance = ignore) -> str:
    """Hash the bytes of a slice: hexadecimal digits.

    Raises: OSError if a file ends early or cannot be read, or a piece is not here.
    """
    digest = hashlib.sha256()
    for block in stored.blocks(part):
        digest.update(block.data)
        advance(block.size)
    return digest.hexdigest()


def verify(folder: Path, advance: Advance = ignore) -> list[str]:
    """Compare every slice in `folder` with its hash: as it lies, and as it is read.

    They differ where slices of several ranks overlap: of those one is read. Files that
    are here as a whole are compared with the hub's hashes, where these are known.

    Returns: what is wrong, a line for each slice or file.

    Raises: ValueError if a file is missing, cut short or broken.
    """
    headers = open_cut(folder).headers
    checks = [
        (part / file, headers[file].tensors[name], written["sha256"])
        for part in rank_folders(folder)
        for file, entry in manifest_of(part)["files"].items()
        for name, written in entry["slices"].items()
    ]

    def fault(check: tuple[Path, StoredTensor, str]) -> str | None:
        file, stored, expected = check
        piece = next(piece for piece in stored.pieces if piece.file == file)
        alone = StoredTensor(stored.tensor, (piece,))
        if sha256(alone, piece.part, advance) != expected:
            return f"{file}: {stored.tensor.name} has changed since it was written"
        others = {run.file for run in stored.plan(piece.part).runs} - {file}
        if others and sha256(stored, piece.part) != expected:
            where = ", ".join(sorted(map(str, others)))
            return f"{file}: {stored.tensor.name} is not what is read from {where}"
        return None

    with ThreadPoolExecutor() as pool:
        of_slices = pool.map(fault, checks)
        of_files = pool.map(_file_fault, headers, headers.values())
        return [line for line in (*of_slices, *of_files) if line]


def _file_fault(file: str, header: Header) -> str | None:
    """What is wrong with a file of the checkpoint, if all of it is here."""
    whole = [(s, Slice(s.tensor.shape)) for s in header.tensors.values()]
    if header.sha256 is None or any(stored.missing(part) for stored, part in whole):
        return None
    digest = hashlib.sha256(header.beginning)
    for stored, part in whole:
        for block in stored.blocks(part):
            digest.update(block.data)
    if digest.hexdigest() == header.sha256:
        return None
    return f"{file} as it is read is not what the hub's SHA-256 says"


def drop_damaged(folder: Path) -> None:
    """Remove files of slices that are not as they were written, to be fetched again.

    A file whose size and time are those of its manifest is taken as it is. Where that
    is no manifest, nothing of a rank's folder counts.

    Raises: OSError if a manifest cannot be read: it may be sound.
    """
    for part in rank_folders(folder):
        try:
            (part / MANIFEST).read_bytes()
            manifest = manifest_of(part)
        except FileNotFoundError:  # another host has removed it
            continue
        except ValueError:
            words = "says nothing: its folder is removed, and its slices fetched again"
            logger.warning(f"{part / MANIFEST} {words}")
            shutil.rmtree(part, ignore_errors=True)  # on other hosts it may be the same
            continue
        stamps = {
            file: _stamp_if_sound(part, file, entry)
            for file, entry in manifest["files"].items()
        }
        kept = {
            file: {**manifest["files"][file], "stamp": now}
            for file, now in stamps.items()
            if now
        }
        if kept != manifest["files"]:
            for file in manifest["files"].keys() - kept.keys():
                (part / file).unlink(missing_ok=True)
            write_json(part / MANIFEST, {**manifest, "files": kept})


def _stamp_if_sound(part: Path, file: str, entry: dict[str, Any]) -> list[int] | None:
    """The stamp that a file has now, if it is what its manifest says."""
    try:
        now = stamp(part / file)
        if now == entry["stamp"]:
            return now
        tensors = read_header(part / file).tensors
    except (OSError, ValueError):
        return None
    is_sound = all(
        name in tensors
        and sha256(tensors[name], Slice(tensors[name].tensor.shape))
        == written["sha256"]
        for name, written in entry["slices"].items()
    )
    return now if is_sound else None

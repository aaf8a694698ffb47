"""Cut checkpoints: folders with slices of a checkpoint's tensors, rank by rank.

    config.json, tokenizer.json, …      as they were
    checkpoint.json                     every tensor of the whole, and its source
    rank-0-of-5/model.safetensors       slices by the names of the tensors, a file
                                        for each of the checkpoint's
    rank-0-of-5/manifest.json           which slices, and their hashes; written last

A machine needs the files at the top and its own rank's folder. In `rest` lies what no
rank reads (a vision tower, say): it makes the checkpoint whole again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from mlxtp.checkpoint import Checkpoint, Header, read_header
from mlxtp.partition import Slice, spans_on, union, without
from mlxtp.tensors import Piece, Tensor, blocks, whole_tensor

CHECKPOINT = "checkpoint.json"
MANIFEST = "manifest.json"
REST = "rest"

# What of a repository makes a model, besides its weights.
SMALL_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]

Advance = Callable[[int], object]  # told of bytes as they are done


@dataclass(frozen=True)
class Origin:
    """What was cut: its name, on the hub the commit, and the headers of its files.

    Tensors lie where they do in the source's files.
    """

    source: str
    revision: str | None
    headers: dict[str, Header]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for header in self.headers.values()
            for name, tensor in header.tensors.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "revision": self.revision,
            "files": {
                file: {
                    "metadata": header.metadata,
                    "tensors": {
                        tensor.name: {
                            "dtype": tensor.kind,
                            "shape": tensor.shape,
                            "offset": tensor.pieces[0].offset,
                        }
                        for tensor in header.tensors.values()
                    },
                }
                for file, header in self.headers.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Origin":
        return cls(
            content["source"],
            content["revision"],
            {
                file: Header(
                    header["metadata"],
                    {
                        name: whole_tensor(
                            name, it["dtype"], it["shape"], Path(file), it["offset"]
                        )
                        for name, it in header["tensors"].items()
                    },
                )
                for file, header in content["files"].items()
            },
        )


@dataclass(frozen=True)
class Share:
    """For whom slices were cut: a rank of a world; nobody, for the rest."""

    weights: tuple[int, ...]
    rank: int | None

    @property
    def folder(self) -> str:
        """`rank-0-of-5`; `rank-0-of-2-1-1` where the weights differ."""
        if self.rank is None:
            return REST
        equal = len(set(self.weights)) == 1
        world = str(len(self.weights)) if equal else "-".join(map(str, self.weights))
        return f"rank-{self.rank}-of-{world}"


def is_cut(folder: Path) -> bool:
    return (folder / CHECKPOINT).exists()


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint in `folder`, whole or cut.

    Raises: ValueError, with the file, if one is missing, cut short or broken.
    """
    if not is_cut(folder):
        return Checkpoint.of_folder(folder).tensors
    return open_cut(folder)


def open_cut(folder: Path) -> dict[str, Tensor]:
    """The tensors of a cut checkpoint, with the pieces that are in `folder`."""
    tensors = origin_of(folder).tensors
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    for part in _rank_folders(folder):
        for name, piece in _pieces(part, tensors):
            pieces[name].append(piece)
    return {
        name: Tensor(name, tensor.kind, tensor.shape, tuple(pieces[name]))
        for name, tensor in tensors.items()
    }


def origin_of(folder: Path) -> Origin:
    """What the cut checkpoint in `folder` was cut from."""
    if not is_cut(folder):
        raise ValueError(f"{folder} is no cut checkpoint")
    try:
        return Origin.from_json(json.loads((folder / CHECKPOINT).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CHECKPOINT} does not describe a checkpoint: {error!r}"
        ) from None


def begin(folder: Path, origin: Origin, small: Mapping[str, bytes]) -> None:
    """Make `folder` a cut checkpoint without slices, with the `small` files.

    Raises: ValueError if it holds slices of another checkpoint.
    """
    if is_cut(folder):
        if origin_of(folder).to_json()["files"] != origin.to_json()["files"]:
            raise ValueError(f"{folder} holds slices of another checkpoint")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and no cut checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small.items():
        (folder / name).write_bytes(content)
    _write_json(folder / CHECKPOINT, origin.to_json())


def small_files(folder: Path) -> dict[str, bytes]:
    """What of a model's folder goes with its weights."""
    found = {file for pattern in SMALL_FILES for file in folder.glob(pattern)}
    return {file.name: file.read_bytes() for file in found if file.name != CHECKPOINT}


def write(
    folder: Path,
    share: Share,
    origin: Origin,
    slices: Mapping[str, Slice],
    advance: Advance = lambda _: None,
) -> Path:
    """Cut the `slices` of the tensors of `origin`, which lie on this machine.

    In memory is a block of a few MB at a time. What was there before stays until all
    of it is written.

    Returns: the folder of the share.
    """
    final = folder / share.folder
    partial = folder / f"{share.folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files = {}
    for name, header in origin.headers.items():
        own = {t: slices[t.name] for t in header.tensors.values() if t.name in slices}
        mine = {tensor: part for tensor, part in own.items() if part.size}
        if mine:
            hashes = _write_file(partial / name, mine, advance)
            files[name] = (mine, hashes)
    _write_manifest(partial, share, origin, files)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def seal(
    partial: Path,
    share: Share,
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
    _write_manifest(partial, share, origin, done)
    final = partial.with_suffix("")
    others = (partial.with_name(f"{final.name}+{n}") for n in count(1))
    partial.rename(next(path for path in chain([final], others) if not path.exists()))


def sha256(tensor: Tensor, part: Slice, advance: Advance = lambda _: None) -> str:
    digest = hashlib.sha256()
    for block in blocks(tensor, part):
        digest.update(block.data)
        advance(block.size)
    return digest.hexdigest()


def drop_damaged(folder: Path) -> None:
    """Let go of files of slices that are not as they were written.

    A file whose size and time are those of its manifest is taken as it is.
    """
    for part in _rank_folders(folder):
        manifest = _manifest(part)
        kept = {
            file: it
            for file, it in manifest["files"].items()
            if _is_sound(part, file, it)
        }
        if kept != manifest["files"]:
            for file in manifest["files"].keys() - kept.keys():
                (part / file).unlink(missing_ok=True)
            _write_json(part / MANIFEST, {**manifest, "files": kept})


def _is_sound(part: Path, file: str, said: dict[str, Any]) -> bool:
    """Whether a file is what its manifest says; if so, with the time that it has."""
    try:
        stamp = _stamp(part / file)
        if stamp == said["stamp"]:
            return True
        tensors = read_header(part / file).tensors
    except (OSError, ValueError):
        return False
    said["stamp"] = stamp
    return all(
        name in tensors
        and sha256(tensors[name], Slice(tensors[name].shape)) == it["sha256"]
        for name, it in said["slices"].items()
    )


def _stamp(file: Path) -> list[int]:
    """A file's size and time: where they are as they were, it is."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _write_manifest(
    part: Path,
    share: Share,
    origin: Origin,
    files: Mapping[str, tuple[Mapping[Tensor, Slice], Mapping[str, str]]],
) -> None:
    manifest = {
        "source": origin.source,
        "revision": origin.revision,
        "world_size": len(share.weights),
        "weights": share.weights,
        "rank": share.rank,
        "files": {
            file: {
                "stamp": _stamp(part / file),
                "slices": {
                    tensor.name: {
                        "axis": it.axis,
                        "spans": it.spans,
                        "sha256": hashes[tensor.name],
                    }
                    for tensor, it in slices.items()
                },
            }
            for file, (slices, hashes) in files.items()
        },
    }
    _write_json(part / MANIFEST, manifest)


def rest(origin: Origin, slices: Iterable[Mapping[str, Slice]]) -> dict[str, Slice]:
    """What no rank has, by tensor."""
    held: dict[str, Slice] = {}
    for of_rank in slices:
        for name, part in of_rank.items():
            held[name] = union(held.get(name, part), part)
    result = {}
    for header in origin.headers.values():
        for name, tensor in header.tensors.items():
            whole, mine = Slice(tensor.shape), held.get(name)
            if mine is None:
                result[name] = whole
            elif mine.axis is not None:
                gone = without(spans_on(whole, mine.axis), mine.spans)
                result[name] = Slice(tensor.shape, mine.axis, gone)
    return {name: part for name, part in result.items() if part.size}


def bytes_of(slices: Mapping[Tensor, Slice]) -> int:
    return sum(part.size * tensor.dtype.size for tensor, part in slices.items())


def lacking(slices: Mapping[Tensor, Slice]) -> dict[Tensor, Slice]:
    """What of `slices` is not here."""
    gone = {tensor: tensor.missing(part) for tensor, part in slices.items()}
    return {tensor: part for tensor, part in gone.items() if part}


def verify(folder: Path, advance: Advance = lambda _: None) -> list[str]:
    """Compare every slice in `folder` with its hash: what is wrong, a line each."""
    tensors = open_cut(folder)
    checks = [
        (file, name, tensors[name], it)
        for part in _rank_folders(folder)
        for file, said in _manifest(part)["files"].items()
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


def shares(folder: Path) -> list[Share]:
    """Whose slices are in `folder`."""
    manifests = [_manifest(part) for part in _rank_folders(folder)]
    return [Share(tuple(it["weights"]), it["rank"]) for it in manifests]


def size_bytes(folder: Path) -> int:
    """Bytes of all slices in `folder`."""
    return sum(
        file.stat().st_size
        for part in _rank_folders(folder)
        for file in part.glob("*.safetensors")
    )


def join(folder: Path, output: Path, advance: Advance = lambda _: None) -> None:
    """Put the whole checkpoint together again, in the files that it had.

    Raises: ValueError if slices are missing, or `output` is not empty.
    """
    origin, tensors = origin_of(folder), open_cut(folder)
    absent = bytes_of(lacking({t: Slice(t.shape) for t in tensors.values()}))
    if absent:
        here = ", ".join(share.folder for share in shares(folder)) or "nothing"
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


def _rank_folders(folder: Path) -> list[Path]:
    """The folders of slices that were written to the end."""
    found = (file.parent for file in folder.glob(f"*/{MANIFEST}"))
    return sorted(part for part in found if part.suffix != ".partial")


def _manifest(part: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((part / MANIFEST).read_text())
        for key in ("world_size", "weights", "rank", "files"):
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{part / MANIFEST} is no manifest of slices: {error!r}"
        ) from None
    return content


def _pieces(part: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Piece]]:
    """What lies in a rank's folder, by tensor."""
    for file, said in _manifest(part)["files"].items():
        header = read_header(part / file)
        for name, it in said["slices"].items():
            if name not in tensors or name not in header.tensors:
                raise ValueError(f"{part / file} does not hold {name}, as it should")
            spans = tuple((start, stop) for start, stop in it["spans"])
            held = Slice(tensors[name].shape, it["axis"], spans)
            stored = header.tensors[name]
            if (stored.kind, stored.shape) != (tensors[name].kind, held.shape):
                raise ValueError(
                    f"{part / file}: {name} is {stored.kind} {stored.shape}, not the "
                    f"{tensors[name].kind} {held.shape} that its manifest promises"
                )
            yield name, Piece(part / file, stored.pieces[0].offset, held)


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


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write at once: nobody sees half of it."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.rename(file)

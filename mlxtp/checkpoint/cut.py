"""Cut checkpoints: folders with slices of a checkpoint's tensors, rank by rank.

    config.json, tokenizer.json, …      as they were
    checkpoint.json                     the headers of the whole, and its source
    shares.json                         what --shares auto has chosen
    rank-0-of-5/model.safetensors       slices by the names of the tensors, a file
                                        for each of the checkpoint's
    rank-0-of-5/manifest.json           which slices, and their hashes; written last

A machine needs the files at the top and its own rank's folder. In `rest` lies what no
rank reads (a vision tower, say): it makes the checkpoint whole again.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mlxtp.checkpoint.headers import (
    Checkpoint,
    Header,
    header_of,
    read_header,
    tensors_in,
)
from mlxtp.checkpoint.tensors import Piece, StoredTensor, Tensor
from mlxtp.partition.shares import Share, Shares
from mlxtp.partition.spans import Slice, Spans

CHECKPOINT = "checkpoint.json"
MANIFEST = "manifest.json"
# The shares that were chosen for this checkpoint, by the machines of the ranks.
CHOSEN = "shares.json"
REST = "rest"
# Of a folder's name: what the shares take of it at most.
LONGEST_NAME = 100

# What of a repository makes a model, besides its weights.
SMALL_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Origin:
    """What was cut: its name, on the hub the commit, and the headers of its files.

    Tensors lie where they do in the source's files. `files` says from which of them
    each tensor is read. Copies of it in others have the same bytes, except for those
    in `different`, by file and name: nobody reads these.
    """

    source: str
    revision: str | None
    headers: dict[str, Header]
    files: dict[str, str]
    different: frozenset[tuple[str, str]] = frozenset()

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors that are read, as they lie in the source's files."""
        return tensors_in(self.headers, self.files)

    def by_file(self, slices: Mapping[str, Slice]) -> dict[str, dict[Tensor, Slice]]:
        """Sort slices of tensors, by name, into the files that these are read from."""
        return {
            file: {
                stored.tensor: slices[name]
                for name, stored in header.tensors.items()
                if name in slices and self.files[name] == file
            }
            for file, header in self.headers.items()
        }

    def stored_in(self, file: str, name: str) -> str:
        """The file in whose place the bytes of a tensor in `file` are kept."""
        return file if (file, name) in self.different else self.files[name]

    def to_json(self) -> dict[str, Any]:
        """Write it as checkpoint.json has it."""
        files_of: dict[str, list[str]] = {}
        for file, header in self.headers.items():
            for name in header.tensors:
                files_of.setdefault(name, []).append(file)
        return {
            "source": self.source,
            "revision": self.revision,
            "files": {
                file: {"header": header.beginning[8:].decode(), "sha256": header.sha256}
                for file, header in self.headers.items()
            },
            "copies": {
                name: {
                    "read": self.files[name],
                    "different": [f for f in files if (f, name) in self.different],
                }
                for name, files in files_of.items()
                if len(files) > 1
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Origin":
        """Read what `to_json` has written.

        Raises: ValueError, KeyError, TypeError or AttributeError for anything else.
        """
        headers = {}
        for file, entry in content["files"].items():
            text = entry["header"].encode()
            beginning = len(text).to_bytes(8, "little") + text
            headers[file] = header_of(Path(file), beginning, sha256=entry["sha256"])
        files: dict[str, str] = {}
        for file, header in headers.items():
            for name in header.tensors:
                files[name] = content["copies"][name]["read"] if name in files else file
        different = (
            (file, name)
            for name, copies in content["copies"].items()
            for file in copies["different"]
        )
        return cls(
            content["source"],
            content["revision"],
            headers,
            files,
            frozenset(different),
        )


@dataclass(frozen=True)
class Shard:
    """For whom slices were cut: a rank of a world; nobody, for the rest."""

    shares: Shares
    rank: int | None

    @property
    def folder(self) -> str:
        """`rank-0-of-5`; `rank-0-of-2-1-1` where the shares differ.

        Shares that would make a long name have a hash of them there.
        """
        if self.rank is None:
            return REST
        world = "-".join(str(share).replace("/", "+") for share in self.shares)
        if len(set(self.shares)) == 1 and not self.shares[0].by_query:
            world = str(len(self.shares))
        elif len(world) > LONGEST_NAME:
            hashed = hashlib.sha256(world.encode()).hexdigest()[:12]
            world = f"{len(self.shares)}-{hashed}"
        return f"rank-{self.rank}-of-{world}"


def is_cut(folder: Path) -> bool:
    """Whether `folder` is a cut checkpoint, with slices or still without."""
    return (folder / CHECKPOINT).exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the checkpoint in `folder`, whole or cut.

    Raises: ValueError, with the file, if one is missing, cut short or broken.
    """
    return open_cut(folder) if is_cut(folder) else Checkpoint.of_folder(folder)


def open_cut(folder: Path) -> Checkpoint:
    """Read which slices of a cut checkpoint are in `folder`.

    Raises: ValueError, with the file, if one is missing, cut short or broken.
    """
    origin = origin_of(folder)
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for part in rank_folders(folder):
        for file, name, piece in _pieces(part, origin):
            pieces.setdefault((file, name), []).append(piece)
    headers = {
        file: Header(
            header.beginning,
            {
                name: StoredTensor(
                    stored.tensor,
                    tuple(pieces.get((origin.stored_in(file, name), name), ())),
                )
                for name, stored in header.tensors.items()
            },
            header.sha256,
        )
        for file, header in origin.headers.items()
    }
    return Checkpoint(headers, tensors_in(headers, origin.files), origin.different)


def origin_of(folder: Path) -> Origin:
    """Read what the cut checkpoint in `folder` was cut from.

    Raises: ValueError if it is none, or its checkpoint.json is broken.
    """
    if not is_cut(folder):
        raise ValueError(f"{folder} is no cut checkpoint")
    try:
        return Origin.from_json(json.loads((folder / CHECKPOINT).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CHECKPOINT} does not describe a checkpoint: {error!r}; cut or "
            "fetch it again"
        ) from None


def begin(folder: Path, origin: Origin, small: Mapping[str, bytes]) -> None:
    """Make `folder` a cut checkpoint without slices, with the `small` files.

    Raises: ValueError if it holds slices of another checkpoint.
    """
    if is_cut(folder):
        there, wanted = origin_of(folder).to_json(), origin.to_json()
        if any(there[key] != wanted[key] for key in ("files", "copies")):
            raise ValueError(f"{folder} holds slices of another checkpoint")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and no cut checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small.items():
        write_bytes(folder / name, content)
    write_json(folder / CHECKPOINT, origin.to_json())


def small_files(folder: Path) -> dict[str, bytes]:
    """Read what of a model's folder goes with its weights: contents by name."""
    files = {file for pattern in SMALL_FILES for file in folder.glob(pattern)}
    return {
        file.name: file.read_bytes()
        for file in files
        if file.name not in (CHECKPOINT, CHOSEN) and file.is_file()
    }


def stamp(file: Path) -> list[int]:
    """A file's size in bytes and time in ns: unchanged, so is the file."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def write_manifest(
    part: Path,
    shard: Shard,
    origin: Origin,
    files: Mapping[str, tuple[Mapping[Tensor, Slice], Mapping[str, str]]],
) -> None:
    """Write whose slices are in the folder `part`: from then on they count.

    `files` gives for each file the slices in it and their SHA-256 by tensor's name.
    """
    manifest = {
        "source": origin.source,
        "revision": origin.revision,
        "world_size": len(shard.shares),
        "shares": [astuple(share) for share in shard.shares],
        "rank": shard.rank,
        "files": {
            file: {
                "stamp": stamp(part / file),
                "slices": {
                    tensor.name: {
                        "axis": wanted.axis,
                        "spans": wanted.spans,
                        "sha256": hashes[tensor.name],
                    }
                    for tensor, wanted in slices.items()
                },
            }
            for file, (slices, hashes) in files.items()
        },
    }
    write_json(part / MANIFEST, manifest)


def shards(folder: Path) -> list[Shard]:
    """Whose slices are in `folder`."""
    manifests = [manifest_of(part) for part in rank_folders(folder)]
    return [
        Shard(Shares(Share(*numbers) for numbers in m["shares"]), m["rank"])
        for m in manifests
    ]


# Machines of ranks, as JSON has them: what tells them from others.
Machines = Sequence[Sequence[Any]]


def kept_shares(folder: Path, machines: Machines) -> Shares | None:
    """The shares that were chosen for ranks on these machines, if they were."""
    chosen = (shares for those, shares in _chosen(folder) if those == machines)
    return next(chosen, None)


def keep_shares(folder: Path, machines: Machines, shares: Shares) -> None:
    """Keep what was chosen with the slices, where the folder may be written to."""
    others = [chosen for chosen in _chosen(folder) if chosen[0] != machines]
    content = [
        {"machines": those, "shares": [astuple(share) for share in of_ranks]}
        for those, of_ranks in [*others, (machines, shares)]
    ]
    with suppress(OSError):
        write_json(folder / CHOSEN, {"chosen": content})


def _chosen(folder: Path) -> list[tuple[Machines, Shares]]:
    """Read what was chosen; a file that cannot be read says nothing."""
    try:
        return [
            (entry["machines"], Shares(Share(*numbers) for numbers in entry["shares"]))
            for entry in json.loads((folder / CHOSEN).read_text())["chosen"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def size_bytes(folder: Path) -> int:
    """Bytes of all slices in `folder`."""
    return sum(
        file.stat().st_size
        for part in rank_folders(folder)
        for file in part.glob("*.safetensors")
    )


def rank_folders(folder: Path) -> list[Path]:
    """The folders of slices in `folder` that were written to the end."""
    parts = (file.parent for file in folder.glob(f"*/{MANIFEST}"))
    return sorted(part for part in parts if part.suffix != ".partial")


def manifest_of(part: Path) -> dict[str, Any]:
    """Read the manifest of a folder of slices.

    Raises: ValueError if it is none.
    """
    try:
        content: dict[str, Any] = json.loads((part / MANIFEST).read_text())
        for key in ("world_size", "shares", "rank", "files"):
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{part / MANIFEST} is no manifest of slices: {error!r}; "
            "remove its folder, and cut or fetch the slices again"
        ) from None
    return content


def _pieces(part: Path, origin: Origin) -> Iterator[tuple[str, str, Piece]]:
    """What lies in a rank's folder: the file that it is of, the tensor and the piece.

    Raises: ValueError if a file does not hold what its manifest promises.
    """
    for file, entry in manifest_of(part)["files"].items():
        header = read_header(part / file)
        wanted = origin.headers[file].tensors if file in origin.headers else {}
        for name, written in entry["slices"].items():
            if name not in wanted or name not in header.tensors:
                raise ValueError(f"{part / file} does not hold {name}, as it should")
            if (holder := origin.stored_in(file, name)) != file:
                raise ValueError(
                    f"{part / file} holds {name}, which is read from {holder}: remove "
                    "its folder, and cut or fetch the slices again"
                )
            tensor, stored = wanted[name].tensor, header.tensors[name]
            held = Slice(tensor.shape, written["axis"], Spans(written["spans"]))
            actual = stored.tensor.kind, stored.tensor.shape
            if actual != (tensor.kind, held.shape):
                raise ValueError(
                    f"{part / file}: {name} is {actual[0]} {actual[1]}, not the "
                    f"{tensor.kind} {held.shape} that its manifest promises"
                )
            yield file, name, Piece(part / file, stored.pieces[0].offset, held)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once, as `write_text`."""
    write_text(file, json.dumps(content, indent=1))


def write_text(file: Path, text: str) -> None:
    """Write a file of text at once, as `write_bytes`."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file at once: nobody sees half of it, whoever else writes it.

    That holds where the power fails, too.
    """
    own = f"{file.name}.{socket.gethostname()}.{os.getpid()}"
    partial = file.with_name(own)
    with open(partial, "wb") as out:
        out.write(content)
        out.flush()
        sync(out.fileno())
    partial.rename(file)
    with suppress(OSError):  # not every file system does this for folders
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync(descriptor: int) -> None:
    """Have what was written to a file on the disk, where the power may fail.

    On macOS fsync leaves it in the drive. UNTESTED on hardware.
    """
    whole = getattr(fcntl, "F_FULLFSYNC", None)
    if whole is not None:
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, whole)
            return
    os.fsync(descriptor)

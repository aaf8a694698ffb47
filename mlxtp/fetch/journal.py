"""Slices on their way: a folder that fills up, and a journal of what has come.

A job that was broken off leaves it behind; the next one goes on with it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import numpy as np

from mlxtp.checkpoint import writing
from mlxtp.checkpoint.cut import Origin, Shard, sync
from mlxtp.checkpoint.tensors import Piece, StoredTensor, bytes_of
from mlxtp.partition.spans import Slice, Span, Spans

LAYOUT = "layout.json"
JOURNAL = "journal.jsonl"

# A line of the journal: a tensor, an axis, the items of it that have come, and whether
# any of the tensor came from the hub.
Note = tuple[str, int, Spans, bool]


class Journal:
    """The slices of tensors that a rank lacks, written as they come.

    `missing` are those that have not come yet, by tensor's name.
    """

    def __init__(
        self, folder: Path, shard: Shard, origin: Origin, slices: Mapping[str, Slice]
    ) -> None:
        """Go on with what an earlier job began for the same slices, if one did."""
        self._shard, self._origin, self._slices = shard, origin, dict(slices)
        self._path = folder / f"{shard.folder}.partial"
        self._files = origin.by_file(slices)
        self._tensors = {t.name: t for of_file in self._files.values() for t in of_file}
        self._goes_on = self._is_ours()
        self.missing = self._slices
        self._from_hub: set[str] = set()  # tensors of which something came from there
        if self._goes_on:
            came = list(self._read_journal())
            self.missing = dict(self._left(came))
            self._from_hub = {name for name, *_, from_hub in came if from_hub}
        self._open: dict[str, FileIO] = {}
        self._bytes_left = self._to_come()
        self._offsets: dict[str, int] = {}
        self._noted: list[Note] = []

    @property
    def bytes_to_write(self) -> int:
        """What the disk still has to hold."""
        return sum(self._to_come().values())

    @property
    def files_from_hub(self) -> set[str]:
        """The files of which something came from the hub, now or in an earlier job."""
        return {
            file
            for file, slices in self._files.items()
            if any(tensor.name in self._from_hub for tensor in slices)
        }

    def begin(self) -> None:
        """Make the files, of the size that they will have; none if nothing lacks."""
        if self._goes_on or not self._slices:
            return
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir()
        for file, slices in self._files.items():
            if slices:
                header, _ = writing.layout(slices)
                with open(self._path / file, "wb") as out:
                    out.write(header)
                    out.truncate(len(header) + bytes_of(slices))
                    out.flush()
                    # Before the layout is, from which on a next job relies on them.
                    sync(out.fileno())
        (self._path / JOURNAL).touch()
        (self._path / LAYOUT).write_text(json.dumps(self._layout()))

    def write(
        self,
        name: str,
        axis: int,
        rows: Span,
        spans: Spans,
        data: np.ndarray,
        *,
        from_hub: bool,
    ) -> None:
        """Put items `spans` of some rows, as seen from `axis`, in their place.

        `data` is (n,) uint8, one row after the other. What came from the hub has still
        to be compared with its hashes; another host's disk has what was.
        """
        if from_hub:
            self._from_hub.add(name)
        target = self._slices[name].on(axis)
        count, _, item = self._tensors[name].seen_from(axis)
        file, offset = self._place(name)
        width = target.length * item
        offset += rows.start * width
        if spans.length == target.length:  # all of these rows: they lie together
            _write_at(file, offset, data)
        else:
            data, done = data.reshape(rows.length, -1), 0
            for span in spans:
                column = target.offset(span.start) * item
                part = data[:, done : done + span.length * item]
                for row, bytes_of_row in enumerate(part):
                    _write_at(file, offset + row * width + column, bytes_of_row)
                done += span.length * item
        self._bytes_left[name] -= data.size
        if count == 1:
            self._noted.append((name, axis, spans, name in self._from_hub))
        elif self._bytes_left[name] == 0:
            self._noted.append((name, axis, target, name in self._from_hub))

    def note(self) -> None:
        """Remember what was written, once it is on the disk."""
        if not self._slices:
            return
        for file in self._open.values():
            sync(file.fileno())
        with open(self._path / JOURNAL, "a") as out:
            for line in self._noted:
                out.write(json.dumps(line) + "\n")
            out.flush()
            sync(out.fileno())
        self._noted.clear()

    def tensors(self, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors `stored`, with the pieces that are being written."""
        result = dict(stored)
        for file, slices in self._files.items():
            _, offsets = writing.layout(slices)
            for tensor, part in slices.items():
                piece = Piece(self._path / file, offsets[tensor.name], part)
                pieces = (*stored[tensor.name].pieces, piece)
                result[tensor.name] = StoredTensor(tensor, pieces)
        return result

    def forget(self, files: Iterable[str]) -> None:
        """Take what has come of some files for missing."""
        if not self._slices:
            return
        gone = {name for file in files for name in self._origin.headers[file].tensors}
        kept = [note for note in self._read_journal() if note[0] not in gone]
        self._noted = kept
        self._from_hub -= gone
        (self._path / JOURNAL).write_text("")
        self.note()
        self.missing = dict(self._left(kept))
        self._bytes_left = self._to_come()

    def finish(self) -> None:
        """Make it a folder of slices like any other."""
        if not self._slices:
            return
        for opened in self._open.values():
            opened.close()
        self._open.clear()
        written = {file: slices for file, slices in self._files.items() if slices}
        # What says that it is not whole goes last: an end meanwhile loses nothing.
        spent = (LAYOUT, JOURNAL)
        writing.seal(self._path, self._shard, self._origin, written, spent)

    def _layout(self) -> object:
        return {name: [part.axis, part.spans] for name, part in self._slices.items()}

    def _is_ours(self) -> bool:
        """Whether an earlier job began with the same slices."""
        try:
            there = json.loads((self._path / LAYOUT).read_text())
        except (OSError, ValueError):
            return False
        return bool(there == json.loads(json.dumps(self._layout())))

    def _read_journal(self) -> Iterator[Note]:
        for line in (self._path / JOURNAL).read_text().splitlines():
            try:
                name, axis, spans, from_hub = json.loads(line)
            except ValueError:  # it was broken off here
                return
            yield name, axis, Spans(spans), from_hub

    def _left(self, came: Iterable[Note]) -> Iterator[tuple[str, Slice]]:
        """What of the slices has not come, by what has."""
        here: dict[str, tuple[int, list[Span]]] = {}
        for name, axis, spans, _ in came:
            here.setdefault(name, (axis, []))[1].extend(spans)
        for name, part in self._slices.items():
            if name not in here:
                yield name, part
                continue
            axis, spans_here = here[name]
            if gone := part.on(axis).difference(spans_here):
                yield name, Slice(part.full_shape, axis, gone.merged())

    def _to_come(self) -> dict[str, int]:
        """Bytes that have not come yet, by tensor."""
        return {
            name: self._tensors[name].bytes_of(part)
            for name, part in self.missing.items()
        }

    def _place(self, name: str) -> tuple[FileIO, int]:
        """The file of a slice, and where it begins there."""
        tensor = self._tensors[name]
        file = next(file for file, slices in self._files.items() if tensor in slices)
        if file not in self._open:
            self._open[file] = FileIO(self._path / file, "r+")
            _, offsets = writing.layout(self._files[file])
            self._offsets |= offsets
        return self._open[file], self._offsets[name]


def _write_at(file: FileIO, offset: int, data: np.ndarray) -> None:
    """Write bytes, (n,) uint8, at their place.

    Not through a map of the file: where the disk is full that ends the process.

    Raises: OSError, with the file, if they cannot be written.
    """
    left = memoryview(np.ascontiguousarray(data).data)
    while left:
        try:
            done = os.pwrite(file.fileno(), left, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.name) from None
        left, offset = left[done:], offset + done

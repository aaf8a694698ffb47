"""What the journal of slices on their way remembers for the next job."""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny

from mlxtp.checkpoint.cut import Origin, Shard
from mlxtp.fetch.journal import LAYOUT, Journal
from mlxtp.fetch.location import Location
from mlxtp.partition.shares import Shares
from mlxtp.partition.spans import Slice, Span, Spans

pytestmark = pytest.mark.once


def model_of_two_slices(tmp_path: Path) -> tuple[Origin, dict[str, Slice]]:
    folder = tmp_path / "model"
    folder.mkdir()
    Tiny().save(folder)
    origin = Location.of_folder("model", folder).origin()
    slices = {
        name: Slice(origin.tensors[name].tensor.shape)
        for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight")
    }
    return origin, slices


def test_files_have_their_headers_before_a_job_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the power fails: what lacks one would never become whole."""
    origin, slices = model_of_two_slices(tmp_path)
    shard = Shard(Shares([1, 1]), 0)
    on_disk: list[tuple[int, int]] = []

    def fsync(descriptor: int) -> None:
        assert not [*tmp_path.glob(f"*/{LAYOUT}")]
        status = os.fstat(descriptor)
        on_disk.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    Journal(tmp_path, shard, origin, slices).begin()
    [file] = tmp_path.glob("*.partial/*.safetensors")
    assert on_disk == [(file.stat().st_ino, file.stat().st_size)]


def test_what_came_from_the_hub_is_remembered(tmp_path: Path) -> None:
    """A job that is broken off may leave the hub's bytes, which nobody has compared."""
    origin, slices = model_of_two_slices(tmp_path)
    shard = Shard(Shares([1, 1]), 0)
    journal = Journal(tmp_path, shard, origin, slices)
    journal.begin()
    for (name, part), from_hub in zip(slices.items(), (False, True), strict=True):
        _, items, item_bytes = origin.tensors[name].tensor.seen_from(0)
        everything = Spans.whole(items)
        data = np.zeros(items * item_bytes, np.uint8)
        assert not journal.files_from_hub
        journal.write(name, 0, Span(0, 1), everything, data, from_hub=from_hub)
        journal.note()
        assert part.on(0) == everything
    again = Journal(tmp_path, shard, origin, slices)
    assert not again.missing
    assert again.files_from_hub == {"model.safetensors"}
    again.forget(["model.safetensors"])
    assert again.missing == slices and not again.files_from_hub

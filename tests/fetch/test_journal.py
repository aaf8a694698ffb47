"""What the journal of slices on their way remembers for the next job."""

from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny

from mlxtp.checkpoint.cut import Shard
from mlxtp.fetch.journal import Journal
from mlxtp.fetch.location import Location
from mlxtp.partition.shares import Shares
from mlxtp.partition.spans import Slice, Span, Spans

pytestmark = pytest.mark.once


def test_what_came_from_the_hub_is_remembered(tmp_path: Path) -> None:
    """A job that is broken off may leave the hub's bytes, which nobody has compared."""
    folder = tmp_path / "model"
    folder.mkdir()
    Tiny().save(folder)
    origin = Location.of_folder("model", folder).origin()
    slices = {
        name: Slice(origin.tensors[name].tensor.shape)
        for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight")
    }
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

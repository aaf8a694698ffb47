"""Checkpoints as Hugging Face publishes them, of which a rank reads its slices."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from published import CASES, published

from mlxtp.checkpoint.tensors import Tensor
from mlxtp.model.skeleton import build
from mlxtp.model.sources import Computed
from mlxtp.sharding.decide import slice_table

pytestmark = pytest.mark.once

RANKS = 3


@pytest.mark.parametrize("case", CASES)
def test_slices_are_those_of_the_whole(case: str, tmp_path: Path) -> None:
    folder = published(case, tmp_path)
    whole = dict(tree_flatten(load_model(folder)[0].parameters()))
    empty = build(folder)
    table = slice_table(empty.model, [1] * RANKS)
    assert not [n for n, s in empty.sources.items() if isinstance(s, Computed)]
    for rank in range(RANKS):
        for name, part in table.slices(rank).items():
            wanted = whole[name]
            if part.axis is not None:
                own = part.spans.indices
                wanted = mx.take(wanted, mx.array(own), part.axis)
            got = empty.sources[name].read(part, empty.checkpoint.read)
            assert got.dtype == wanted.dtype
            assert mx.array_equal(got, wanted, equal_nan=True), name


@pytest.mark.parametrize("case", CASES)
def test_reads_own_bytes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is cut about a third, as far as the rows are longer than a page."""
    folder = published(case, tmp_path)
    empty = build(folder)
    table = slice_table(empty.model, [1] * RANKS)
    empty.settle(table.slices(0))
    computed = {n for n, s in empty.sources.items() if isinstance(s, Computed)}
    assert computed == ({"lm_head.weight"} if case == "norm_head" else set())
    monkeypatch.setattr("mlxtp.checkpoint.runs.PAGE_BYTES", 1)
    read = 0
    preadv = os.preadv

    def counted(fd: int, buffers: list[Any], offset: int) -> int:
        nonlocal read
        count = preadv(fd, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    for name, part in table.slices(0).items():
        matrix = table.matrix_of(name)
        if matrix is None or name in computed:
            continue
        before = read
        made = empty.sources[name].read(part, empty.checkpoint.read)
        share = part.size / np.prod(part.full_shape)
        source = sum(t.size for t in _bytes_behind(empty.sources[name]))
        # What a block of FP8 has in common with others is read by all of them.
        slack = 1.3 if case != "fp8" else 2.5
        assert read - before <= slack * share * source + 128, (name, made.shape)


def _bytes_behind(source: Any) -> list[np.ndarray]:
    """As many bytes as the tensors that a parameter is made of have."""
    if isinstance(source, Tensor):
        return [np.empty(int(np.prod(source.shape)) * source.dtype.size, np.uint8)]
    if isinstance(source, mx.array):
        return []
    return [b for inner in source.inputs for b in _bytes_behind(inner)]

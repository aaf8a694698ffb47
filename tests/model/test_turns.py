"""What cannot be followed by slices is computed by one rank for all, in every form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hub_client import Client, serve
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from published import published
from reference import PROMPT, on_rank_0

from mlxtp import Communicator, loading
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.comm.errors import UsageError
from mlxtp.model.skeleton import build
from mlxtp.model.sources import Computed, cut_out
from mlxtp.model.turns import compute_for_all
from mlxtp.shard import report, shard
from mlxtp.sharding.decide import slice_table


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No primitive can be followed."""
    monkeypatch.setattr("mlxtp.model.sources.PRIMITIVES", {})
    monkeypatch.setattr("mlxtp.model.turns.CHUNK_BYTES", 10_000)


@pytest.fixture(scope="module")
def folder(comm: Communicator, shared_path: Path) -> Path:
    """Experts, which mlx-lm stacks."""
    result = shared_path / "computed"
    if comm.rank == 0:
        result.mkdir()
        published("stacked", result)
    comm.barrier()
    return result


def tokens(model: Any) -> list[int]:
    steps = generate_step(mx.array(PROMPT), model, max_tokens=8)
    return [token for token, _ in steps]


def test_the_same_from_a_folder_a_cut_and_the_hub(
    comm: Communicator,
    folder: Path,
    shared_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = on_rank_0(comm, lambda: tokens(load_model(folder)[0]))
    output = shared_path / "computed-cut"
    if comm.rank == 0:
        shard(folder, [1] * comm.size, output)
        assert report(output)
    comm.barrier()
    for path in (folder, output, folder if comm.rank else output):
        assert tokens(loading.load_model(path, comm)[0]) == expected
    client = Client(comm, monkeypatch)
    asked = client.count()
    whole = (folder / "model.safetensors").stat().st_size
    with serve(comm, {"org/model": folder}) as (_, url):
        client.use(url, tmp_path)
        model, _ = loading.load_model("org/model", comm)
    assert tokens(model) == expected
    assert asked[0] <= 1.3 * whole / comm.size
    # Of the tensors a rank keeps its rows alone.
    kept = list(tmp_path.glob("assets/**/rank-*/*.safetensors"))
    shared = 0.2 * whole if comm.size > 1 else 0  # routers, norms: on every rank
    assert sum(f.stat().st_size for f in kept) <= 1.1 * whole / comm.size + shared
    comm.barrier()


def test_each_slice_is_that_of_the_whole(comm: Communicator, folder: Path) -> None:
    """To the bit; besides slices a rank holds one parameter and its tensors at once."""
    empty = build(folder)
    slices = slice_table(empty.model, [1] * comm.size).slices(comm.rank)
    computed = {n: s for n, s in empty.sources.items() if isinstance(s, Computed)}
    largest = max(np.prod(s.shape) * s.dtype.size for s in computed.values())
    assert len(computed) == 3
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loading.compute_slices(empty, empty.checkpoint, slices, comm)
    held = sum(np.prod(slices[n].shape) * s.dtype.size for n, s in computed.items())
    assert mx.get_peak_memory() - before <= held + 2.2 * largest + held / 3
    whole = dict(tree_flatten(load_model(folder)[0].parameters()))
    got = dict(tree_flatten(empty.model.parameters()))
    for name in computed:
        assert mx.array_equal(got[name], cut_out(whole[name], slices[name])), name


def test_an_error_of_one_rank_is_one_of_all(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file cannot be read, and where mlx-lm refuses what is in it."""
    empty = build(folder)
    last = comm.size - 1
    name, source = next(
        (n, s) for n, s in empty.sources.items() if isinstance(s, Computed)
    )
    part = slice_table(empty.model, [1] * comm.size).slices(comm.rank)[name]

    def refuse(tensors: dict[str, mx.array]) -> mx.array:
        assert comm.rank == last
        raise ValueError("not these")

    refusing = replace(source, compute=refuse)
    with pytest.raises(UsageError, match="not these"):
        compute_for_all(comm, last, refusing, empty.checkpoint, part)
    if comm.rank == last:
        monkeypatch.setattr(StoredTensor, "read", unreadable)
    with pytest.raises(UsageError, match="cannot be read"):
        compute_for_all(comm, 0, source, empty.checkpoint, part)


def unreadable(*_: Any) -> None:
    raise OSError("cannot be read")

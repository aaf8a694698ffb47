"""What cannot be followed by slices is computed by one rank for all, in every form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hub_client import Client, serve
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from published import published
from reference import PROMPT, on_rank_0

from mlxtp import Communicator, loading
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.comm.errors import UsageError
from mlxtp.model.skeleton import EmptyModel, build
from mlxtp.model.sources import Computed, cut_out
from mlxtp.model.turns import compute_for_all
from mlxtp.partition.spans import Slice
from mlxtp.shard import report, shard
from mlxtp.sharding.decide import slice_table

STACKS = "model.layers.1.mlp.switch_mlp"
# A published form, and what of it is computed whole.
CASES = {
    "stacked": {f"{STACKS}.{name}_proj.weight" for name in ("gate", "up", "down")},
    # Divided by norms over the axis that it is cut on.
    "norm_head": {"lm_head.weight"},
}


@pytest.fixture(params=CASES)
def folder(
    request: pytest.FixtureRequest,
    comm: Communicator,
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A checkpoint; stacks of experts are computed as if nothing could be followed."""
    monkeypatch.setattr("mlxtp.model.turns.CHUNK_BYTES", 10_000)
    if request.param == "stacked":
        monkeypatch.setattr("mlxtp.model.sources.PRIMITIVES", {})
    result = shared_path / request.param
    if comm.rank == 0 and not result.exists():
        result.mkdir()
        published(request.param, result)
    comm.barrier()
    return result


def tokens(model: Any) -> list[int]:
    steps = generate_step(mx.array(PROMPT), model, max_tokens=8)
    return [token for token, _ in steps]


def opened(comm: Communicator, folder: Path) -> tuple[EmptyModel, dict[str, Slice]]:
    """The model without weights, and this rank's slices of what is computed whole."""
    empty = build(folder)
    slices = slice_table(empty.model, [1] * comm.size).slices(comm.rank)
    empty.settle(slices)
    computed = {n for n, s in empty.sources.items() if isinstance(s, Computed)}
    assert computed == CASES[folder.name]
    return empty, {name: slices[name] for name in computed}


def test_the_same_from_a_folder_a_cut_and_the_hub(
    comm: Communicator, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some hosts have all; a rank keeps and fetches its rows alone."""
    expected = on_rank_0(comm, lambda: tokens(load_model(folder)[0]))
    output = folder.with_name(f"{folder.name}-cut")
    if comm.rank == 0:
        shard(folder, [1] * comm.size, output)
        assert report(output)
    comm.barrier()
    for path in (folder, folder if comm.rank else output):
        assert tokens(loading.load_model(path, comm)[0]) == expected
    client = Client(comm, monkeypatch)
    with serve(comm, {"org/model": folder}) as (_, url):
        client.use(url, tmp_path)
        assert tokens(loading.load_model("org/model", comm)[0]) == expected
    empty, slices = opened(comm, folder)
    kept = Checkpoint.of_files(tmp_path.glob("assets/**/rank-*/*.safetensors"))
    for name in slices:
        source = empty.sources[name]
        assert isinstance(source, Computed)
        for tensor in source.tensors:
            rows = kept.tensors[tensor.name].tensor.shape[0]
            assert rows <= -(-tensor.shape[0] // comm.size)


def test_each_slice_is_that_of_the_whole(comm: Communicator, folder: Path) -> None:
    """To the bit; besides slices a rank holds one parameter and its tensors at once."""
    empty, slices = opened(comm, folder)
    sizes = {n: a.nbytes for n, a in tree_flatten(empty.model.parameters())}
    largest = max(sizes[name] for name in slices)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loading.compute_slices(empty, empty.checkpoint, slices, comm)
    peak = mx.get_peak_memory() - before
    held = sum(part.size * 4 for part in slices.values())
    under_way = max(part.size * 4 for part in slices.values())
    # A head is computed in several steps.
    steps = 3 if folder.name == "norm_head" else 1
    assert peak <= held + (1 + steps) * largest + under_way + 10_000
    whole = dict(tree_flatten(load_model(folder)[0].parameters()))
    got = dict(tree_flatten(empty.model.parameters()))
    for name, part in slices.items():
        assert mx.array_equal(got[name], cut_out(whole[name], part)), name


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_of_one_rank_is_one_of_all(
    error: type[Exception],
    comm: Communicator,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a file cannot be read, and where mlx-lm refuses what is in it."""
    empty, slices = opened(comm, folder)
    name, part = min(slices.items())
    source, last = empty.sources[name], comm.size - 1
    assert isinstance(source, Computed)

    def refuse(tensors: dict[str, mx.array]) -> mx.array:
        assert comm.rank == last
        raise error("not these")

    refusing = replace(source, compute=refuse)
    with pytest.raises(UsageError, match="not these"):
        compute_for_all(comm, last, refusing, empty.checkpoint, part)
    if comm.rank == last:
        monkeypatch.setattr(StoredTensor, "read", unreadable)
    with pytest.raises(UsageError, match="cannot be read"):
        compute_for_all(comm, 0, source, empty.checkpoint, part)


def unreadable(*_: Any) -> None:
    raise OSError("cannot be read")

"""What cannot be followed by slices is computed by one rank for all, in every form."""

from dataclasses import replace
from functools import partial
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
from mlxtp.model.reading import compute_slices
from mlxtp.model.skeleton import EmptyModel, _Loader, build
from mlxtp.model.sources import Computed, cut_out
from mlxtp.model.turns import compute_for_all, tensors_behind
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
    compute_slices(empty, empty.checkpoint, slices, comm)
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


def test_a_turn_is_counted_before_anything_is_read(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors, the parameter and the largest slice; once a host."""
    prepared = loading.prepare(folder, comm)
    _, slices = opened(comm, folder)
    whole = max(4 * Slice(slices[name].full_shape).size for name in slices)
    assert 2 * whole < prepared.turn_bytes <= 3 * whole
    held = sum(comm.allgather_object(prepared.nbytes)) + prepared.turn_bytes
    monkeypatch.setattr(comm, "host", "one")
    monkeypatch.setattr(loading.memory, "available_bytes", lambda _: held)
    loading.prepare(folder, comm)
    monkeypatch.setattr(loading.memory, "available_bytes", lambda _: held - 1)
    with pytest.raises(UsageError, match=r"the slices of .* for one take"):
        loading.prepare(folder, comm)


def test_an_error_of_one_rank_is_one_of_all(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file cannot be read, and where mlx-lm refuses what is in it."""
    empty, slices = opened(comm, folder)
    name, part = min(slices.items())
    source, last = empty.sources[name], comm.size - 1
    assert isinstance(source, Computed)

    def refuse(error: Exception, _: dict[str, mx.array]) -> mx.array:
        assert comm.rank == last
        raise error

    for error in (
        ValueError("not these"),
        RuntimeError("not\nthese"),
        KeyError("these"),
    ):
        refusing = replace(source, compute=partial(refuse, error))
        with pytest.raises(UsageError, match=r"a parameter of .*these"):
            compute_for_all(comm, last, refusing, empty.checkpoint, part)
    if comm.rank == last:
        monkeypatch.setattr(StoredTensor, "read", unreadable)
    with pytest.raises(UsageError, match="cannot be read"):
        compute_for_all(comm, 0, source, empty.checkpoint, part)


def test_what_one_rank_cannot_follow_all_compute_in_turn(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX makes other graphs on other devices; where tensors differ, all are told."""
    folder, last = shared_path / "followed", comm.size - 1
    if comm.rank == 0:
        folder.mkdir()
        published("stacked", folder)
    expected = on_rank_0(comm, lambda: tokens(load_model(folder)[0]))
    if comm.rank == last:
        monkeypatch.setattr("mlxtp.model.sources.PRIMITIVES", {})
    prepared = loading.prepare(folder, comm)
    of_ranks = comm.allgather_object(tensors_behind(prepared.empty.sources))
    assert of_ranks == [of_ranks[0]] * comm.size and CASES["stacked"] <= {*of_ranks[0]}
    assert tokens(prepared.load()) == expected
    behind = _Loader.behind
    if comm.rank == last:
        monkeypatch.setattr(_Loader, "behind", lambda *args: behind(*args)[1:])
    if comm.size > 1:
        with pytest.raises(UsageError, match="made of other tensors here than on rank"):
            loading.prepare(folder, comm)


def unreadable(*_: Any) -> None:
    raise OSError("cannot be read")

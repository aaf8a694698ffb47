"""The caches of a dry run have the shapes of a split model's, on every rank."""

from pathlib import Path

import mlx.core as mx
import pytest
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache
from reference import MODELS, on_rank_0
from saved_types import saved
from tiny import made_by_rank_0

from mlxtp import Communicator
from mlxtp.dryrun.caches import cache_arrays
from mlxtp.loading import load_model
from mlxtp.model.skeleton import build

use_plain_operations()

# Types whose caches differ, and that can be split over five ranks: whole, sliding, of
# states, latent.
TYPES = ["gemma3_text", "mamba2", "deepseek_v3", "qwen3_next"]


def shapes(caches: list) -> list:
    """Of every cache: the shapes and dtypes of its arrays, in order."""
    leaves = []
    for cache in caches:
        if isinstance(cache, CacheList):
            leaves += shapes(list(cache.caches))
        else:
            arrays = (x for _, x in tree_flatten(cache.state))
            leaves.append(
                [(x.shape, x.dtype) for x in arrays if isinstance(x, mx.array)]
            )
    return leaves


def check(folder: Path, comm: Communicator, tokens: int, batch: int) -> None:
    model, _ = load_model(folder, comm)
    real = make_prompt_cache(model)
    mx.eval(model(mx.zeros((batch, tokens), mx.int32), cache=real))
    comm.traffic.reset()
    dry = cache_arrays(
        build(folder), model.slice_table, comm.rank, batch=batch, tokens=tokens
    )
    assert [type(cache) for cache in dry] == [type(cache) for cache in real]
    assert shapes(dry) == shapes(real)
    assert any(shapes(dry)) and comm.traffic.calls == 0


@pytest.mark.parametrize("model_type", TYPES)
def test_shapes_are_those_of_the_split_model(
    model_type: str, comm: Communicator, shared_path: Path
) -> None:
    folder = comm.bcast_object(on_rank_0(comm, lambda: saved(model_type, shared_path)))
    check(folder, comm, tokens=8, batch=1)


def test_longer_and_several_sequences(comm: Communicator, shared_path: Path) -> None:
    """Longer than a step of 256 tokens, by which caches grow."""
    name = "affine-4-64"
    folder = made_by_rank_0(MODELS[name], shared_path / f"dry-{name}", comm)
    check(folder, comm, tokens=300, batch=2)


def test_one_rank_alone_can_ask(comm: Communicator, shared_path: Path) -> None:
    """No rank waits for another, and every rank can be asked about."""
    folder = made_by_rank_0(MODELS["affine-4-64"], shared_path / "dry-alone", comm)
    model, _ = load_model(folder, comm)
    last, heads = comm.size - 1, []
    if comm.rank == last:
        for rank in range(comm.size):
            caches = cache_arrays(build(folder), model.slice_table, rank)
            heads.append(caches[0].state[0].shape[1])
    own = next(s.parts for s in model.slice_table.blocks if "kv" in s.counts)
    assert comm.bcast_object(heads, last) == [part.size("kv") for part in own]

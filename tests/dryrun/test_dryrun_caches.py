"""The caches of a dry run have the shapes of a split model's, on every rank."""

from pathlib import Path

import mlx.core as mx
import pytest
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache
from reference import MODELS
from saved_types import saved
from tiny import made_by_rank_0

from mlxtp import Communicator
from mlxtp.dryrun.caches import cache_arrays
from mlxtp.dryrun.passes import DryRunCommunicator
from mlxtp.loading import load_model

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
    dry = cache_arrays(model, batch=batch, tokens=tokens)
    assert [type(cache) for cache in dry] == [type(cache) for cache in real]
    assert shapes(dry) == shapes(real)
    assert any(shapes(dry)) and comm.traffic.calls == 0


@pytest.mark.parametrize("model_type", TYPES)
def test_shapes_are_those_of_the_split_model(
    model_type: str, comm: Communicator, shared_path: Path
) -> None:
    folder = saved(model_type, comm)
    check(folder, comm, tokens=8, batch=1)


def test_longer_and_several_sequences(comm: Communicator, shared_path: Path) -> None:
    """Longer than a step of 256 tokens, by which caches grow."""
    name = "affine-4-64"
    folder = made_by_rank_0(MODELS[name], shared_path / f"dry-{name}", comm)
    check(folder, comm, tokens=300, batch=2)


def test_one_rank_alone_can_ask(comm: Communicator, shared_path: Path) -> None:
    """No rank waits for another, and true collectives go on afterwards."""
    folder = made_by_rank_0(MODELS["affine-4-64"], shared_path / "dry-alone", comm)
    model, _ = load_model(folder, comm)
    if comm.rank == comm.size - 1:
        heads = cache_arrays(model)[0].state[0].shape[1]
        own = next(s.parts for s in model.slice_table.blocks if "kv" in s.counts)
        assert heads == own[comm.rank].size("kv")
    assert comm.allreduce(mx.array([1.0])).item() == comm.size


def test_another_communicator_goes_on() -> None:
    one, other = DryRunCommunicator(0, 2), DryRunCommunicator(1, 3)
    with one.dry_run():
        other.iallreduce(mx.zeros(8), "somewhere").wait()
    [step] = other.script.take()
    assert (step.kind, step.path, step.part_bytes) == ("allreduce", "somewhere", 32)

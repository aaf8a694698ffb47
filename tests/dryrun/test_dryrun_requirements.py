"""What a dry run says that a rank needs is what the rank then holds, for every type."""

import logging
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from every_type import REPRESENTATIVES
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from pyramid import sweep
from reference import MODELS
from saved_types import saved
from tiny import made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.dryrun.passes import DryRunCommunicator
from mlxtp.dryrun.requirements import need, needs
from mlxtp.loading import load_model
from mlxtp.model.skeleton import build
from mlxtp.sharding.decide import slice_table

use_plain_operations()

RUNNABLE = [t for t in zoo.model_types() if t not in zoo.UNAVAILABLE]
# The first rank and the last own most and least: one of them, in turns.
RANKS = [(0, 1), (1, 2), (0, 3), (4, 5), (0, 8)]
# Types whose caches differ: whole, sliding, latent, of states, of several kinds.
CACHES = [
    *("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2", "qwen3_next"),
    *("recurrent_gemma", "jamba", "longcat_flash", "afm7"),
]


def held(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.once
@pytest.mark.parametrize(
    "model_type", sweep([*RUNNABLE, *zoo.VARIANTS], REPRESENTATIVES)
)
def test_bytes_are_those_that_a_rank_loads(
    model_type: str, comm: Communicator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    folder = saved(model_type, comm)
    whole = build(folder).model
    for rank, size in RANKS:
        # With it a process reads what that rank of such a world reads.
        alone = DryRunCommunicator(rank, size)
        try:
            table = slice_table(whole, [1] * size)
        except ValueError:  # fewer heads, or columns, than ranks
            with pytest.raises(ValueError):
                load_model(folder, alone)
            continue
        model, _ = load_model(folder, alone)
        needed = need(build(folder), table, rank, context=9)
        assert needed.weights_bytes == held(model), (rank, size)


@pytest.mark.parametrize(
    "name", ["llama-8-2-biases", "affine-4-128", "qwen3-64-4-tied"]
)
def test_every_rank_of_mpirun_holds_what_it_needs(
    name: str, comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(MODELS[name], shared_path / f"plan-{name}", comm)
    model, _ = mlxtp.load(folder, comm)
    all_ranks = needs(partial(build, folder), [1] * comm.size, context=9)
    assert all_ranks[comm.rank].weights_bytes == held(model)


@pytest.mark.once
@pytest.mark.parametrize("model_type", sweep(CACHES, CACHES[:6]))
def test_caches_have_the_bytes_of_the_dry_run(
    model_type: str, comm: Communicator
) -> None:
    """Longer than a step of 256 tokens, by chunks as mlx-lm reads them."""
    folder, context = saved(model_type, comm), 300
    model, _ = load_model(folder, comm)
    cache = make_prompt_cache(model)
    for tokens in context - 1, 1:
        model(mx.zeros((1, tokens), mx.int32), cache=cache)
        mx.eval([kept.state for kept in cache])
    [needed] = needs(partial(build, folder), [1], context)
    for kept, planned in zip(cache, needed.dry_run.caches, strict=True):
        assert kept.nbytes == planned.nbytes

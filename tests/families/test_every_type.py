"""Every model type that mlx-lm brings says on all ranks what it says on one.

The types are found by listing mlx-lm's package: one that is neither in the table nor
recognised fails here.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from every_type import (
    EVEN_WORLDS,
    PROMPT,
    REPRESENTATIVES,
    RUNNABLE,
    check_logits,
)
from kept import kept
from metal_kernels import use_plain_operations
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from pyramid import sweep
from reference import as_numpy
from saved_types import saved

from mlxtp import Communicator
from mlxtp.loading import load_model as load_split

use_plain_operations()

STEPS = 12  # past the windows of `zoo`, 8 tokens

# What a rank may hold of the matrices that are cut, as a multiple of an even share, in
# worlds in which the heads of `zoo` can be shared out so.
MOST_SHARE = 1.3

QUICK_QUANTIZED = [
    *("llama", "deepseek_v3", "qwen3_next", "gpt_oss", "mamba2", "phi3small"),
]


@pytest.mark.parametrize(
    "model_type", sweep([*RUNNABLE, *zoo.VARIANTS], REPRESENTATIVES)
)
def test_float32(model_type: str, comm: Communicator) -> None:
    check(model_type, comm)


@pytest.mark.parametrize(
    "model_type",
    sweep(
        [t for t in RUNNABLE if t not in zoo.QUANTIZED_FAILS],
        QUICK_QUANTIZED,
    ),
)
def test_quantized(model_type: str, comm: Communicator) -> None:
    check(model_type, comm, bits=4)


def check(model_type: str, comm: Communicator, bits: int | None = None) -> None:
    folder = saved(model_type, comm, bits)
    expected = kept(comm, f"{folder.name}-steps", lambda _: alone(folder))
    counted = Counted(comm)
    model, _ = load_split(folder, counted)
    logits, tokens = run(model)
    counted.elements.clear()
    mx.eval(model(mx.array([[1]]), cache=make_prompt_cache(model)))

    hashes = comm.allgather_object([as_numpy(x).tobytes() for x in logits])
    assert all(theirs == hashes[0] for theirs in hashes), "ranks differ"
    check_logits(model_type, logits, expected["logits"])
    assert tokens == expected["tokens"]

    table = model.slice_table
    assert not table.unexplained()
    if comm.size > 1:
        promised = [made.elements for made in table.collectives()]
        if table.family.loops:  # layers are called more than once
            promised, counted.elements = [*{*promised}], [*{*counted.elements}]
        assert sorted(counted.elements) == sorted(promised)
    held, whole = share(model, comm.rank)
    most = max(comm.allgather_object(held)) * comm.size
    if comm.size in EVEN_WORLDS and model_type not in zoo.VARIANTS:
        assert most <= MOST_SHARE * whole, f"{most / whole:.2f} x an even share"


class Counted:
    """A communicator that writes down how many elements its collectives have."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.elements: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        self.elements.append(x.size)
        return self.comm.allreduce(x, at)

    def allgather(self, x: mx.array, sizes: list[int], at: str = "") -> mx.array:
        self.elements.append(sum(sizes) * x.size // x.shape[-1])
        return self.comm.allgather(x, sizes, at)


def alone(folder: Path) -> dict[str, Any]:
    """Load a model as mlx-lm does, in one process, and run it."""
    model, _ = load_model(folder)
    logits, tokens = run(model)
    return {"logits": [as_numpy(x) for x in logits], "tokens": tokens}


def run(model: nn.Module) -> tuple[list[mx.array], list[int]]:
    """Prefill in two pieces, greedy steps with the cache, and a batch."""
    cache = make_prompt_cache(model)
    pieces = [PROMPT[:6], PROMPT[6:]]
    logits = [model(mx.array([piece]), cache=cache) for piece in pieces]
    tokens = []
    for _ in range(STEPS):
        tokens.append(mx.argmax(logits[-1][0, -1]).item())
        logits.append(model(mx.array([[tokens[-1]]]), cache=cache))
    batch = mx.array([PROMPT, PROMPT[::-1]])
    logits.append(model(batch, cache=make_prompt_cache(model)))
    return logits, tokens


def share(model: nn.Module, rank: int) -> tuple[int, int]:
    """Elements that the rank holds of the matrices that are cut, and all there are."""
    table = model.slice_table
    whole = held = 0
    for name, part in table.slices(rank).items():
        if matrix := table.matrix_of(name):
            size = int(np.prod(part.full_shape))
            whole += size
            if matrix.cut.style == "repack":  # more is read than held
                held += size * matrix.spans[rank].length // matrix.features
            else:
                held += part.size
    return held, whole

"""What the tests of all model types share."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from pyramid import sweep
from reference import as_numpy
from saved_types import saved

from mlxtp import Communicator
from mlxtp.loading import load_model

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
# It passes every window (8 tokens), chunk (8; in bailing_hybrid 128), block (32) and
# convolution (4) of `zoo`, most of them many times.
LONG: list[int] = np.random.default_rng(0).integers(zoo.VOCABULARY, size=150).tolist()

# Of each piece of a prompt the logits of so many tokens are compared. What comes before
# them shows in the caches.
LAST = 16

# Of the largest logit, in float32: what the order of a sum makes of it.
TOLERANCE = 2e-4
# Where something is rounded to 16 bits or fewer on the way, a step of that.
ROUNDED_TOLERANCE = 3e-2

# Worlds in which the heads of `zoo` can be shared out evenly.
EVEN_WORLDS = (1, 2, 3, 5)

RUNNABLE = [t for t in zoo.model_types() if t not in zoo.UNAVAILABLE]


# One of each kind of block, for a quick run: the table's commonest family, fused
# projections, segments by head, latents, experts, state spaces, linear attention, short
# convolutions, wide norms, keys of other layers, packed ternary layers.
REPRESENTATIVES = [
    *("llama", "bailing_moe", "gpt_neox", "deepseek_v3", "gpt_oss", "mamba2"),
    *("qwen3_next", "jamba", "lfm2", "olmo2", "gemma3n", "bitnet", "gemma3_text"),
]


def for_types(
    types: list[str], quick: list[str], worlds: Sequence[int] = ()
) -> pytest.MarkDecorator:
    """Run a test for each model type, beside the other tests of that type.

    Those not in `quick` run in `worlds` alone, where these are given.

    They share what `split` has loaded: pytest sorts all tests of a run by a parameter
    of the session.
    """
    values = sweep(types, quick, worlds)
    return pytest.mark.parametrize("model_type", values, scope="session")


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


@lru_cache(maxsize=1)
def split(model_type: str, comm: Communicator) -> nn.Module:
    """A model of this type in float32 on all ranks, `Counted`; no test changes it."""
    return load_model(saved(model_type, comm), Counted(comm))[0]


def check_logits(
    model_type: str, logits: list[mx.array], expected: list[np.ndarray]
) -> None:
    """Compare logits with those of one process."""
    tolerance = ROUNDED_TOLERANCE if model_type in zoo.BFLOAT16 else TOLERANCE
    for got, wanted in zip(logits, expected, strict=True):
        finite = np.isfinite(wanted)
        error = np.abs(as_numpy(got)[finite] - wanted[finite]).max()
        assert error <= tolerance * np.abs(wanted[finite]).max()

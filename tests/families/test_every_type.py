"""Every model type that mlx-lm brings says on all ranks what it says on one.

The types are found by listing mlx-lm's package: one that is neither in the table nor
recognised fails here.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from equal import Tied, Tokens
from every_type import (
    EVEN_WORLDS,
    LAST,
    LONG,
    PROMPT,
    REPRESENTATIVES,
    RUNNABLE,
    Counted,
    check_logits,
    for_types,
    split,
)
from kept import kept
from metal_kernels import use_plain_operations
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.utils import load_model
from reference import as_numpy
from saved_types import saved

from mlxtp import Communicator
from mlxtp.loading import load_model as load_split

use_plain_operations()

# A prompt is read in pieces: shorter than the windows of `zoo`, 8 tokens; longer than
# every chunk; no multiple of either. Then come so many steps that a window's cache is
# overwritten from its beginning, what is said next, and steps again.
SIZES = 7, 132, 11
STEPS = 10
NEXT = PROMPT[::-1]
MORE_STEPS = 2

# A quantized model reads a shorter one, for MLX's quantized products are slow on a CPU.
# Where a type leaves it to the caller, its cache keeps the first four tokens and the
# latest of so many, as with --max-kv-size.
QUANTIZED_SIZES = 7, 37, 17
KEPT_TOKENS = 13

# What a rank may hold of the matrices that are cut, as a multiple of an even share, in
# worlds in which the heads of `zoo` can be shared out so.
MOST_SHARE = 1.3

QUICK_QUANTIZED = [
    *("llama", "deepseek_v3", "qwen3_next", "gpt_oss", "mamba2", "phi3small"),
]


@for_types([*RUNNABLE, *zoo.VARIANTS], REPRESENTATIVES, worlds=[1, 3, 5])
def test_float32(model_type: str, comm: Communicator) -> None:
    folder = saved(model_type, comm)
    expected = kept(comm, f"{folder.name}-steps", lambda _: alone(folder, SIZES))
    check(model_type, split(model_type, comm), expected, SIZES)


@for_types(
    [t for t in RUNNABLE if t not in zoo.QUANTIZED_FAILS],
    QUICK_QUANTIZED,
    worlds=[5],
)
def test_quantized(model_type: str, comm: Communicator) -> None:
    folder = saved(model_type, comm, bits=4)
    how = QUANTIZED_SIZES, KEPT_TOKENS
    expected = kept(comm, f"{folder.name}-steps", lambda _: alone(folder, *how))
    model, _ = load_split(folder, Counted(comm))
    check(model_type, model, expected, *how)


def check(
    model_type: str,
    model: nn.Module,
    expected: dict[str, Any],
    sizes: Sequence[int],
    max_kv_size: int | None = None,
) -> None:
    """Compare logits, tokens, collectives and what ranks hold with what is expected."""
    comm, table = model.comm, model.slice_table
    logits = run(model, sizes, max_kv_size, expected["tokens"])
    hashes = comm.allgather_object([as_numpy(x).tobytes() for x in logits])
    assert all(theirs == hashes[0] for theirs in hashes), "ranks differ"
    check_logits(model_type, logits, expected["logits"])
    assert chosen(logits) == expected["tokens"]

    comm.elements.clear()
    mx.eval(model(mx.array([[1]]), cache=make_prompt_cache(model)))
    assert not table.unexplained()
    if comm.size > 1:
        promised = [made.elements for made in table.collectives()]
        counted = comm.elements
        if table.family.loops:  # layers are called more than once
            promised, counted = [*{*promised}], [*{*counted}]
        assert sorted(counted) == sorted(promised)
    held, whole = share(model, comm.rank)
    most = max(comm.allgather_object(held)) * comm.size
    if comm.size in EVEN_WORLDS and model_type not in zoo.VARIANTS:
        assert most <= MOST_SHARE * whole, f"{most / whole:.2f} x an even share"


def alone(
    folder: Path, sizes: Sequence[int], max_kv_size: int | None = None
) -> dict[str, Any]:
    """Load a model as mlx-lm does, in one process, and run it."""
    model, _ = load_model(folder)
    logits = run(model, sizes, max_kv_size)
    return {"logits": [as_numpy(x) for x in logits], "tokens": chosen(logits)}


def run(
    model: nn.Module,
    sizes: Sequence[int],
    max_kv_size: int | None = None,
    tokens: list[int] | None = None,
) -> list[mx.array]:
    """Read a prompt in pieces, decode, read on, decode; and read a batch.

    Returns: the logits of each forward pass. Steps go on with `tokens` where these are
    given, so that all logits can be compared whatever a tie makes of one token.
    """
    cache = make_prompt_cache(model, max_kv_size)
    logits = []

    def read(piece: list[int]) -> None:
        logits.append(model(mx.array([piece]), cache=cache)[:, -LAST:])

    def decode(steps: int) -> None:
        for _ in range(steps):
            best = mx.argmax(logits[-1][0, -1])
            read([best.item() if tokens is None else tokens[len(logits) - len(sizes)]])

    for stop, size in zip(accumulate(sizes), sizes, strict=True):
        read(LONG[stop - size : stop])
    decode(STEPS)
    read(NEXT)
    decode(MORE_STEPS)
    for layer in leaves(cache):
        if size := getattr(layer, "max_size", getattr(layer, "chunk_size", None)):
            assert layer.offset > 4 * size, "not past its window"
    batch = mx.array([PROMPT, PROMPT[::-1]])
    logits.append(model(batch, cache=make_prompt_cache(model, max_kv_size)))
    return logits


def chosen(logits: list[mx.array]) -> Tokens:
    """The likeliest token behind each forward pass of one prompt."""
    last = [x[0, -1] for x in logits[len(SIZES) - 1 : -1]]
    return Tokens([mx.argmax(scores).item() for scores in last], last)


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


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


def a_norm(model: nn.Module) -> None:
    """Two per cent more."""
    model.layers[0].input_layernorm.weight *= 1.02


def a_head(model: nn.Module) -> None:
    """One head of sixteen is missing."""
    model.layers[1].self_attn.o_proj.weight[:, : zoo.HEAD] = 0


def a_mask(model: nn.Module) -> None:
    """A window that is one token wider."""
    model.model.sliding_window += 1


@pytest.mark.once
@pytest.mark.parametrize("broken", [a_norm, a_head, a_mask])
def test_what_is_broken_differs(broken: Callable[[nn.Module], None]) -> None:
    expected = run(zoo.build("llama")[0], SIZES)
    model, _ = zoo.build("llama")
    broken(model)
    logits = run(model, SIZES, tokens=chosen(expected))
    with pytest.raises(AssertionError):
        check_logits("llama", logits, [as_numpy(x) for x in expected])
    if broken is a_mask:  # in the others the same words still win
        assert chosen(logits) != chosen(expected)


@pytest.mark.once
def test_tokens_are_equal_where_two_are_as_good_as_tied() -> None:
    def tokens(second: int, lead: float) -> Tokens:
        scores = mx.array([[5.0, -5, 0, 0], [0, 5 + lead, 5, -5], [0, 0, 5, -5]])
        return Tokens([0, second, 2], scores)

    near, far = 2e-4, 1e-3  # of the largest logit, 5: less and more than 1e-4
    with pytest.warns(Tied, match="token 1 is 1 or 2"):
        assert tokens(1, near) == tokens(2, -near)
    assert tokens(1, far) != tokens(2, -near)
    assert tokens(1, near) != tokens(3, -near)
    assert tokens(1, near) != tokens(1, near)[:2]
    assert tokens(1, far) == [0, 1, 2] != tokens(2, far)
    with pytest.warns(Tied):
        assert pickle.loads(pickle.dumps(tokens(2, near))) == [0, 1, 2]

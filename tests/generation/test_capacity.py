"""What caches take is known beforehand, and what they may take is kept to."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from every_type import for_types, split
from hypothesis import given
from hypothesis import strategies as st
from metal_kernels import use_plain_operations
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from saved_types import saved
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.generation import capacity
from mlxtp.generation.capacity import (
    CacheBytes,
    Capacity,
    Growth,
    RankCapacity,
    measure,
)
from mlxtp.model.skeleton import build

use_plain_operations()

# Whole, sliding, states, states beside others in lists, chunks, latents, lists.
TYPES = ["llama", "gemma3_text", "mamba2", "falcon_h1", "llama4", "longcat_flash"]


def read(model: Any, caches: list[Any], tokens: int) -> int:
    """Read so many tokens, and return what the caches take then."""
    model(mx.zeros((1, tokens), mx.int32), cache=caches)
    mx.eval([cache.state for cache in caches])
    return sum(cache.nbytes for cache in caches)


@for_types([*TYPES, "deepseek_v41"], [*TYPES[:5], "deepseek_v41"])
def test_bytes_are_those_of_real_caches(model_type: str, comm: Communicator) -> None:
    """At the first token of a step they have the most room."""
    model = split(model_type, comm)
    known, caches = CacheBytes.of(model), make_prompt_cache(model)
    assert read(model, caches, 10) <= known.bytes(10, part=10)
    for tokens in 30, 60, 256:  # parts that are no steps
        caches = copy.deepcopy(caches)
        done = read(model, caches, tokens - 10 if tokens < 256 else 196)
        assert done <= known.bytes(tokens if tokens < 256 else 266, part=196)
    caches = make_prompt_cache(model)
    read(model, caches, 256)
    exact = read(model, caches, 1)
    if model_type == "deepseek_v41":  # a class of its own
        assert exact <= known.bytes(257) <= 2 * exact
    else:
        assert known.bytes(257) == exact


@pytest.mark.once
def test_bytes_of_windows_and_quantized_caches(
    comm: Communicator, shared_path: Path
) -> None:
    sliding = {"layer_types": ["sliding_attention", "full_attention"]}
    folder = made_by_rank_0(
        Tiny({**sliding, "sliding_window": 300, "head_dim": 32}),
        shared_path / "window",
        comm,
    )
    model, _ = mlxtp.load(folder, comm)
    plain = CacheBytes.of(model)
    caches, tokens = make_prompt_cache(model), 0
    for part in [100, 1, 155, 1, 290, 7, 1, 1]:
        tokens += part
        assert read(model, caches, part) <= plain.bytes(tokens, part)
    assert sum(cache.nbytes for cache in caches) <= plain.bytes(tokens)
    assert plain.bytes(tokens) - plain.bytes(tokens - 1) == 2 * 2 * 32 * 4

    folder = made_by_rank_0(Tiny({"head_dim": 32}), shared_path / "whole", comm)
    model, _ = mlxtp.load(folder, comm)
    for start in 0, 300:
        packed = CacheBytes.quantized(model, 8, 32, start)
        caches, tokens = make_prompt_cache(model), 0
        for part in [200, 56, 1, 1, 254, 256, 1]:
            tokens += part
            assert read(model, caches, part) <= packed.bytes(tokens, part)
            maybe_quantize_kv_cache(caches, start, kv_group_size=32, kv_bits=8)
            mx.eval([cache.state for cache in caches])
        nbytes = sum(cache.nbytes for cache in caches)
        # With a start they were larger before.
        assert nbytes <= packed.bytes(tokens) < CacheBytes.of(model).bytes(tokens)
        assert start or nbytes == packed.bytes(tokens)


LAYERS = 40


def sequence(tokens: int) -> list[Any]:
    caches = [KVCache() if i % 2 else RotatingKVCache(700) for i in range(LAYERS)]
    return grown(caches, tokens, rows=1)


def grown(caches: list[Any], tokens: int, rows: int) -> list[Any]:
    for cache in caches:
        cache.update_and_fetch(*[mx.ones((rows, 2, tokens, 32))] * 2)
    mx.eval([cache.state for cache in caches])
    return caches


@pytest.mark.once
def test_a_batch_takes_no_more_at_any_moment() -> None:
    """Not even while it is merged, extended, filtered and made longer."""
    token_bytes = LAYERS / 2 * 2 * 2 * 32 * 4
    known = CacheBytes(0, (Growth(token_bytes), Growth(token_bytes, 700)), 2 * LAYERS)
    rank = RankCapacity("here", known, 1)
    cache_limit = mx.set_cache_limit(0)
    before = mx.get_active_memory()

    def check(rows: list[int], others: list[int] = []) -> None:  # noqa: B006
        used = rank.used_bytes(rows, others, 0, part=512)
        assert mx.get_peak_memory() - before <= used
        held = mx.get_active_memory() - before
        # Besides there are a few whole numbers for each row and layer.
        assert held <= known.batch_bytes(len(rows), max(rows)) + 10_000
        mx.reset_peak_memory()

    try:
        lengths = [1000, 513, 900, 400]
        parts = [sequence(n) for n in lengths]
        mx.reset_peak_memory()
        batch = [layer[0].merge(list(layer)) for layer in zip(*parts, strict=True)]
        del parts
        mx.eval([cache.state for cache in batch])
        # What is merged counts until it is gone.
        check(lengths, lengths)
        grown(batch, 1, rows=4)
        check([n + 1 for n in lengths])
        new = [cache.merge([cache]) for cache in sequence(1290)]
        for cache, other in zip(batch, new, strict=True):
            cache.extend(other)
        del new, other, cache
        mx.eval([cache.state for cache in batch])
        check([1001, 514, 901, 401, 1290], [1290])
        grown(batch, 1, rows=5)
        check([1002, 515, 902, 402, 1291])
        for cache in batch:
            cache.filter([0, 1, 2])
        del cache
        mx.eval([cache.state for cache in batch])
        check([1002, 515, 902, 402, 1291])
        # What is left lies filled up to the row that has gone until it is written to.
        grown(batch, 1, rows=3)
        check([1003, 516, 1292])
        grown(batch, 1, rows=3)
        check([1004, 517, 904])
    finally:
        mx.set_cache_limit(cache_limit)


@pytest.mark.once
def test_windows_and_states_of_a_draft_are_there_twice() -> None:
    """A `Point` keeps them as they were; keys and values are cut."""
    draft = CacheBytes(100, (Growth(3.0), Growth(2.0, 500), Growth(4.0, 8, True)), 6)
    assert draft.point_bytes(2000) == 100 + 2 * 500
    model = CacheBytes(0, (), 1)
    with_draft = RankCapacity("here", model, 1, draft=draft)
    rows = [2000, 3000]
    wanted = sum(draft.bytes(tokens) + draft.point_bytes(tokens) for tokens in rows)
    assert with_draft.used_bytes(rows, [], 0, part=64) == wanted


def two_ranks(limits: tuple[int, int]) -> Capacity:
    wide = CacheBytes(100, (Growth(3.0), Growth(1.0, 500)), 80)
    slim = CacheBytes(50, (Growth(2.0),), 80)
    ranks = zip(("one", "two"), (wide, slim), limits, strict=True)
    return Capacity(tuple(RankCapacity(*rank) for rank in ranks), part=64)


@pytest.mark.once
@given(
    st.lists(st.integers(1, 3000), max_size=5),
    st.lists(st.integers(1, 3000), max_size=3),
    st.integers(1000, 40_000),
)
def test_what_fits(rows: list[int], others: list[int], limit: int) -> None:
    known = two_ranks((limit, 2 * limit))
    kept = known.bytes_of(100) if others else (0, 0)
    use = known.fullest(rows, others, kept)
    assert known.fits(rows, others, kept) == (use <= 1)
    assert use <= known.fullest([*rows, 1], others, kept)
    assert use <= known.fullest(rows, [*others, 1], kept)
    assert use <= known.fullest(rows, others, [x + 1 for x in kept])
    longest = known.longest(3000)
    assert longest == 0 or (known.fits([longest], []) and known.fits([], [longest]))
    assert longest == 3000 or not (
        known.fits([longest + 1], []) and known.fits([], [longest + 1])
    )


def test_limits_are_those_of_the_hosts(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on all ranks, of which those on one host share what is free."""
    folder = saved("llama", comm)
    model, _ = mlxtp.load_model(folder, comm)

    def measured(free: int, **options: Any) -> Capacity:
        monkeypatch.setattr(capacity, "available_bytes", lambda _: free)
        return measure(model, comm, partial(build, folder), part=32, rows=4, **options)

    ample = measured(10**9)
    assert {*comm.allgather_object(ample)} == {ample}
    limits = [rank.limit_bytes for rank in ample.ranks]
    caches = [rank.cache.bytes(4096) for rank in ample.ranks]
    assert 0.6e9 < sum(limits) < 0.9e9 - comm.size * 15e6
    shares = [limit / nbytes for limit, nbytes in zip(limits, caches, strict=True)]
    assert max(shares) == pytest.approx(min(shares))
    assert ample.ranks[comm.rank].cache == CacheBytes.of(model)
    assert ample.longest(500) == 500

    given_limit = measured(10**9, kv_gb=0.004)
    limits = [rank.limit_bytes for rank in given_limit.ranks]
    assert max(limits) == 4_000_000
    assert 0 < given_limit.longest(10**6) < ample.longest(10**6)
    with pytest.raises(UsageError, match=r"--kv-gb 2: that is 2.* GB on rank 0, and"):
        measured(10**9, kv_gb=2)
    with pytest.raises(UsageError, match="quantization group size 24"):
        measured(10**9, kv_bits=8, kv_group_size=24)
    with pytest.raises(UsageError, match=r"caches of 256 tokens take .* GB on rank"):
        measured(10**6)
    with pytest.raises(UsageError, match=r"--kv-gb 1e-05 gives 1e-05 GB for them"):
        measured(10**9, kv_gb=1e-5)

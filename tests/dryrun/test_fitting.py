"""Shares that fit: even in time where memory is to spare, in bytes where it is not."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zoo
from models import LLAMA_3_2_1B

from mlxtp.dryrun.caches import CONTEXT_STEP
from mlxtp.dryrun.fitting import Fitting, _largest_heads
from mlxtp.dryrun.requirements import Need, needs
from mlxtp.partition.shares import Shares
from mlxtp.plan.model import PlannedModel, model_of_config
from mlxtp.sharding.decide import slice_table

pytestmark = pytest.mark.once

# Eight KV heads on five ranks, whose caches take as much as weights.
SMALL = LLAMA_3_2_1B | {
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": 8192,
}
CONTEXT, BATCH = 4096, 4
EVEN = Shares([1] * 5)


@dataclass(frozen=True)
class Rank:
    """A host of its own."""

    host: str
    limit_bytes: int | None
    bytes_per_second: float = 1e9


@pytest.fixture(scope="module")
def small() -> Iterator[PlannedModel]:
    with model_of_config("small", SMALL, 16) as model:
        yield model


@pytest.fixture(scope="module")
def even(small: PlannedModel) -> list[Need]:
    return needs(small.build, EVEN, CONTEXT, BATCH)


def hosts(*limits: int | None) -> list[Rank]:
    return [Rank(f"host {number}", limit) for number, limit in enumerate(limits)]


def fullest(model: PlannedModel, shares: Shares, context: int = CONTEXT) -> int:
    return max(need.bytes for need in needs(model.build, shares, context, BATCH))


def test_bytes_are_even_where_memory_decides(
    small: PlannedModel, even: list[Need]
) -> None:
    """Three ranks have two KV heads, so these get fewer columns; caches count."""
    mean = sum(need.bytes for need in even) // 5
    limit = mean + mean // 50
    assert max(need.bytes for need in even) > limit
    fitting = Fitting(small.build, hosts(*[limit] * 5), CONTEXT, BATCH)
    fit = fitting.best(CONTEXT)
    assert fit.lacking_bytes == 0 and not fit.shares[0].by_query
    assert fit.shares[0].mlp < 0.8 * fit.shares[4].mlp
    assert fullest(small, fit.shares) < 1.01 * limit
    # With shorter caches columns are more even.
    shorter = fitting.best(CONTEXT // 8).shares
    assert shorter[0].mlp * fit.shares[4].mlp > fit.shares[0].mlp * shorter[4].mlp
    assert fitting.longest(1 << 20) < CONTEXT  # a token would be 5 % slower
    waits = Fitting(
        small.build, hosts(*[limit] * 5), CONTEXT, BATCH, collective_seconds=1.0
    )
    longest = waits.longest(1 << 20)
    assert CONTEXT <= longest <= 1.3 * CONTEXT and longest % CONTEXT_STEP == 0
    assert waits.suited(1 << 20) == waits.best(longest).shares
    assert fitting.best(1 << 20).lacking_bytes > 0


def test_time_decides_where_memory_is_to_spare(
    small: PlannedModel, even: list[Need]
) -> None:
    plenty = 2 * sum(need.bytes for need in even)
    alike = Fitting(small.build, hosts(*[plenty] * 4, None), CONTEXT // 8)
    assert alike.best(CONTEXT // 8).shares == EVEN
    ranks = [*hosts(*[plenty] * 4), Rank("slow", plenty, 0.5e9)]
    slow = Fitting(small.build, ranks, CONTEXT // 8).best(CONTEXT // 8).shares
    assert slow[4].mlp / slow[0].mlp == pytest.approx(0.5, abs=0.05)
    assert slow[4].vocabulary / slow[0].vocabulary == pytest.approx(0.5, abs=0.05)


def test_ranks_of_one_host_share_its_memory(
    small: PlannedModel, even: list[Need]
) -> None:
    plenty = 2 * sum(need.bytes for need in even)
    limit = sum(need.bytes for need in even[:4]) - 50_000_000
    ranks = [*[Rank("one", limit)] * 4, Rank("other", plenty)]
    fitting = Fitting(small.build, ranks, CONTEXT, BATCH)
    fit = fitting.best(CONTEXT)
    assert fit.lacking_bytes == 0 and fit.shares[4].mlp > fit.shares[0].mlp
    fitting.reserve([2e6] * 4 + [0.0])
    less = fitting.best(CONTEXT).shares
    assert less[0].mlp * fit.shares[4].mlp < fit.shares[0].mlp * less[4].mlp
    of_ranks = needs(small.build, fit.shares, CONTEXT, BATCH)
    assert sum(need.bytes for need in of_ranks[:4]) < 1.02 * limit


def test_what_one_rank_leaves_another_of_its_host_may_take(
    small: PlannedModel, even: list[Need]
) -> None:
    """Even shares fit, of which the first rank needs more than half of its host."""
    plenty = 2 * sum(need.bytes for need in even)
    limit = even[0].bytes + even[4].bytes + 1_000_000
    names = "one", "other", "other", "other", "one"
    ranks = [Rank(name, limit if name == "one" else plenty) for name in names]
    assert even[0].bytes > limit / 2 + 2_000_000
    fitting = Fitting(small.build, ranks, CONTEXT, BATCH)
    attention = fitting._attention(EVEN)
    assert attention is not None
    fit = fitting._fit(attention, CONTEXT, fitting._limits)
    assert fit.lacking_bytes == 0 and fit.shares == EVEN


def test_query_heads_go_one_by_one_where_that_is_faster() -> None:
    """Attention is most of this model, and whole groups give a rank two of eight."""
    config = SMALL | {"intermediate_size": 512}
    with model_of_config("attention", config, 16) as model:
        fit = Fitting(model.build, hosts(*[None] * 5), 256).best(256)
        assert fit.shares[0].by_query
        of_ranks = needs(model.build, fit.shares, 256)
        waits = Fitting(model.build, hosts(*[None] * 5), 256, collective_seconds=1.0)
        assert not waits.best(256).shares[0].by_query
    queries = [need.owned.query_heads[0] for need in of_ranks]
    assert sum(queries) == 32 and max(queries) <= 7


def test_attention_is_found_beside_a_state_space_with_more_heads() -> None:
    config = zoo.build("nemotron_h")[1] | {
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8},
        **{"mamba_num_heads": 64, "n_groups": 8, "mamba_head_dim": 8},
    }
    with model_of_config("hybrid", config, 16) as model:
        table = slice_table(model.build().model, EVEN)
    assert max(s.counts.get("q", 0) for s in table.blocks) == 64
    assert _largest_heads(table) == (32, 8, True)


def test_ranks_with_other_zeros_need_something_else(small: PlannedModel) -> None:
    """Six query heads each: four and two, or three and three, under two KV heads."""
    of_ranks = needs(small.build, Shares.parse("queries=6,7,6,13"), 64)
    assert [need.query_heads // 4 for need in of_ranks] == [8, 12, 6, 16]


def test_shares_may_be_far_apart(small: PlannedModel) -> None:
    most, least = needs(small.build, Shares([10**400, 1]), 64)
    assert most.owned.kv_heads == (7, 7) and least.owned.kv_heads == (1, 1)


@pytest.mark.parametrize(
    "model_type", ["llama", "deepseek_v3", "gemma3_text", "mamba2"]
)
def test_caches_are_estimated_as_they_are(model_type: str) -> None:
    """KV heads of a rank, latents of all, windows, and states."""
    shares = Shares([1] * 3)
    with model_of_config(model_type, zoo.build(model_type)[1], 16) as model:
        exact = [need.cache_bytes for need in needs(model.build, shares, 300)]
        fitting = Fitting(model.build, hosts(*[None] * 3), 300)
        attention = fitting._attention(shares)
        assert attention is not None
        estimated = [fitting._caches(300, kv) for kv in attention.kv]
    assert estimated == pytest.approx(exact, rel=0.1)

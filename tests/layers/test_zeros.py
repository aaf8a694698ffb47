"""Zeros in place of query heads that a rank does not have: the same attention."""

from copy import deepcopy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import Model, ModelArgs

from mlxtp import Communicator
from mlxtp.layers.parallelize import parallelize
from mlxtp.layers.zeros import with_zeros, without_zeros
from mlxtp.partition.shares import Share
from mlxtp.sharding.decide import slice_table

pytestmark = pytest.mark.once

HEAD, HIDDEN, HEADS, KV_HEADS = 8, 48, 12, 3


class Partial(Communicator):
    """A rank of a world whose sums stay partial."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        """Return the part of this rank."""
        return x


def whole() -> Model:
    mx.random.seed(0)
    return Model(
        ModelArgs(
            model_type="llama",
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            intermediate_size=64,
            num_attention_heads=HEADS,
            rms_norm_eps=1e-5,
            vocab_size=32,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD,
            attention_bias=True,
        )
    )


def of_rank(model: Model, rank: int, shares: list[Share]) -> nn.Module:
    """The attention of one rank, which has its slices alone."""
    model = deepcopy(model)
    table = slice_table(model, shares)
    arrays = dict(tree_flatten(model.parameters()))
    slices = [
        (
            name,
            arrays[name]
            if part.axis is None
            else mx.take(arrays[name], mx.array(part.spans.indices), part.axis),
        )
        for name, part in table.slices(rank).items()
    ]
    model.update(tree_unflatten(slices))
    parallelize(model, table, Partial(rank, len(shares)))
    return model.layers[0].self_attn


def attended(attention: nn.Module, x: mx.array) -> mx.array:
    """Read some tokens, then one."""
    cache = KVCache()
    first = attention(x[:, :-1], "causal", cache)
    return mx.concatenate([first, attention(x[:, -1:], None, cache)], axis=1)


def test_it_is_the_product_with_columns_and_rows_of_zeros() -> None:
    """W_q with zeros in its columns, W_o with zeros in its rows.

    Query heads 3 to 8 of 12: one under KV head 0, four under 1, one under 2.
    """
    model = whole()
    shares = [Share(number, 1, 1, True) for number in (3, 6, 3)]
    mine = of_rank(model, 1, shares)
    assert mine.q_proj.weight.shape == (6 * HEAD, HIDDEN)
    assert (mine.n_heads, mine.n_kv_heads) == (12, 3)
    filled = deepcopy(model.layers[0].self_attn)
    has = mx.repeat(mx.array([3 <= head < 9 for head in range(HEADS)]), HEAD)
    filled.q_proj.weight = mx.where(has[:, None], filled.q_proj.weight, 0)
    filled.q_proj.bias = mx.where(has, filled.q_proj.bias, 0)
    # The rank's zeros stand before its first head and behind its last: as there.
    filled.o_proj.weight = mx.where(has, filled.o_proj.weight, 0)
    filled.o_proj.bias = mx.zeros_like(filled.o_proj.bias)
    x = mx.random.normal((2, 7, HIDDEN))
    queries = mine.q_proj(x)
    assert mx.array_equal(queries, filled.q_proj(x))
    assert not queries[..., : 3 * HEAD].any() and not queries[..., -3 * HEAD :].any()
    # What the heads of zeros see is multiplied by zeros, or by nothing.
    mine.o_proj.bias = mx.zeros_like(mine.o_proj.bias)
    assert mx.allclose(attended(mine, x), attended(filled, x), atol=1e-6)


@pytest.mark.parametrize("numbers", [(5, 5, 2), (1, 10, 1), (4, 4, 4), (7, 3, 1, 1)])
def test_ranks_make_the_whole_together(numbers: tuple[int, ...]) -> None:
    model = whole()
    shares = [Share(number, 1, 1, True) for number in numbers]
    x = mx.random.normal((2, 7, HIDDEN))
    expected = attended(model.layers[0].self_attn, x)
    bias = model.layers[0].self_attn.o_proj.bias
    ranks = [of_rank(model, rank, shares) for rank in range(len(numbers))]
    for mine, number in zip(ranks, numbers, strict=True):
        assert mine.o_proj.linear.weight.shape == (HIDDEN, number * HEAD)
    parts = [attended(mine, x) - bias for mine in ranks]
    assert mx.allclose(sum(parts) + bias, expected, atol=1e-5)


def test_zeros_are_put_among_features_and_left_out() -> None:
    fill = (2, 3), (1, 2), (1, 0)
    x = mx.arange(1, 11).reshape(2, 5)
    filled = with_zeros(x, fill)
    assert filled.tolist()[0] == [0, 0, 1, 2, 3, 0, 4, 5, 0]
    assert without_zeros(filled, fill).tolist() == x.tolist()
    assert with_zeros(x.T, fill, 0).T.tolist() == filled.tolist()

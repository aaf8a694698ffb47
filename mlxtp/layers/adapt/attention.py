"""Attention: norms over all heads, and widths that are taken for the hidden size."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.adapt import become
from mlxtp.layers.norms import RMSNormOverRanks
from mlxtp.layers.parallel import Communicating


def norm_together(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Norm queries and keys over all ranks with one allreduce for both."""
    queries = _NormedQueries(
        attention.q_proj, attention.k_proj, attention.q_norm, attention.k_norm, comm
    )
    queries.path = f"{shards.path}.q_norm"
    attention.q_proj, attention.k_proj = queries, _NormedKeys(queries)
    attention.q_norm = attention.k_norm = nn.Identity()


class _NormedQueries(Communicating):
    """Project queries and keys, and norm each over all heads.

    Shapes: x (B, L, D) replicated -> queries (B, L, local heads * head_dim) sharded.
    Communicates: one allreduce of 2*B*L elements, in float32.
    """

    inner = True

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        q_norm: RMSNormOverRanks,
        k_norm: RMSNormOverRanks,
        comm: Communicator,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj = q_proj, k_proj
        self.q_norm, self.k_norm = q_norm, k_norm
        self.comm = comm
        self._keys: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        made = [
            (norm, proj(x))
            for norm, proj in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj))
        ]
        squares = self.comm.allreduce(
            mx.concatenate([norm.shard.squares(y) for norm, y in made], axis=-1),
            self.path,
        )
        queries, self._keys = (
            norm.shard.normed(y, squares[..., i : i + 1], norm.eps, norm.weight)
            for i, (norm, y) in enumerate(made)
        )
        return queries

    def take_keys(self) -> mx.array:
        """The keys of the last call, once."""
        keys, self._keys = self._keys, None
        assert keys is not None
        return keys


class _NormedKeys(nn.Module):
    """Give the keys that were made with the queries."""

    def __init__(self, queries: _NormedQueries) -> None:
        super().__init__()
        self._queries = queries

    def __call__(self, x: mx.array) -> mx.array:
        return self._queries.take_keys()


def _heads(x: mx.array, number: int) -> mx.array:
    """(B, L, heads * dims) -> (B, heads, L, dims)."""
    return x.reshape(*x.shape[:2], number, -1).transpose(0, 2, 1, 3)


def _flat(x: mx.array) -> mx.array:
    """(B, heads, L, dims) -> (B, L, heads * dims)."""
    return x.transpose(0, 2, 1, 3).flatten(2)


def any_width(attention: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Do without the assumption that all heads together are as wide as the input."""
    become(attention, _AnyWidth)


class _AnyWidth:
    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        offset = 0 if cache is None else cache.offset
        queries = self.rope(_heads(self.q_proj(x), self.n_heads), offset=offset)
        keys = self.rope(_heads(self.k_proj(x), self.n_kv_heads), offset=offset)
        values = _heads(self.v_proj(x), self.n_kv_heads)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        mixed = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.out_proj(_flat(mixed))


def any_packed_width(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """As `any_width`, for a fused projection and convolved keys and values."""
    become(attention, _AnyPackedWidth)


class _AnyPackedWidth:
    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        last: Any = cache and cache[0]
        kv_cache: Any = cache and cache[1]
        offset = 0 if last is None else kv_cache.offset
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        packed = mx.split(self.W_pack(x), (width, width + kv_width), axis=-1)
        queries = _heads(packed[0], self.num_heads)
        new = [_heads(y, self.num_kv_heads) for y in packed[1:]]
        keys, values = (
            self._custom_convolution(y, weights, state=last and last[i])
            for i, (y, weights) in enumerate(
                zip(new, (self.conv_k, self.conv_v), strict=True)
            )
        )
        queries, keys = (self.rope(y, offset=offset) for y in (queries, keys))
        if last is not None:
            keys, values = kv_cache.update_and_fetch(keys, values)
            last[0], last[1] = (y[:, :, -1:] for y in new)
        mixed = scaled_dot_product_attention(
            queries, keys, values, cache=kv_cache, scale=self.scale, mask=mask
        )
        return self.o_proj(_flat(mixed))


def mask_of_own_heads(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Take the rank's heads of a mask that is another one for every head."""
    own = shards.parts[comm.rank].spans["q"].indices
    make = type(attention)._block_sparse_mask
    whole = SimpleNamespace(
        **{name: value for name, value in vars(attention).items() if "block" in name},
        n_heads=shards.counts["q"],
        n_kv_heads=shards.counts["kv"],
        n_q_per_kv=shards.counts["q"] // shards.counts["kv"],
    )
    local_kv_heads = shards.parts[comm.rank].size("kv")

    def mask(q_length: int, kv_length: int) -> tuple[mx.array, ...]:
        return tuple(
            m.flatten(0, 1)[mx.array(own)].reshape(local_kv_heads, -1, *m.shape[2:])
            for m in make(whole, q_length, kv_length)
        )

    attention._block_sparse_mask = mask


def count_groups(attention: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Number the rank's output groups from zero."""
    attention._group_ids = mx.arange(attention.o_groups)[None]

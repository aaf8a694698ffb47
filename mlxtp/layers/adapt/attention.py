"""Attention: norms over all heads, widths taken for the hidden size, and masks."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.forward import Forward, change_forward, twin


def norm_together(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Norm queries and keys over all ranks with one allreduce for both."""
    change_forward(attention, _NormTogether(comm, f"{shards.path}.q_norm"))


@dataclass(frozen=True)
class _NormTogether:
    """Project queries and keys and norm each over all heads, before the rest.

    The rest of the forward pass is called with projections that give what is made.

    Shapes: x (B, L, D) replicated.
    Communicates: one allreduce of 2*B*L elements, in float32, besides attention's own.
    """

    comm: Communicator
    path: str

    def __call__(
        self, former: Forward, attention: Any, x: mx.array, *args: Any, **options: Any
    ) -> mx.array:
        norms = attention.q_norm, attention.k_norm
        projected = attention.q_proj(x), attention.k_proj(x)
        squares = [n.shard.squares(y) for n, y in zip(norms, projected, strict=True)]
        summed = self.comm.allreduce(mx.concatenate(squares, axis=-1), self.path)
        queries, keys = (
            norm.shard.normed(y, summed[..., i : i + 1], norm.eps, norm.weight)
            for i, (norm, y) in enumerate(zip(norms, projected, strict=True))
        )
        normed = twin(
            attention,
            q_proj=lambda _: queries,
            k_proj=lambda _: keys,
            q_norm=nn.Identity(),
            k_norm=nn.Identity(),
        )
        return former(normed, x, *args, **options)


def _heads(x: mx.array, number: int) -> mx.array:
    """(B, L, heads * dims) -> (B, heads, L, dims)."""
    return x.reshape(*x.shape[:2], number, -1).transpose(0, 2, 1, 3)


def _flat(x: mx.array) -> mx.array:
    """(B, heads, L, dims) -> (B, L, heads * dims)."""
    return x.transpose(0, 2, 1, 3).flatten(2)


def any_width(attention: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Do without the assumption that all heads together are as wide as the input."""
    change_forward(attention, _attend_any_width)


def _attend_any_width(
    former: Forward, attention: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> mx.array:
    """As mlx-lm's exaone, for as many heads as there are."""
    offset = 0 if cache is None else cache.offset
    queries = attention.rope(
        _heads(attention.q_proj(x), attention.n_heads), offset=offset
    )
    keys = attention.rope(
        _heads(attention.k_proj(x), attention.n_kv_heads), offset=offset
    )
    values = _heads(attention.v_proj(x), attention.n_kv_heads)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    mixed = scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=attention.scale, mask=mask
    )
    return attention.out_proj(_flat(mixed))


def any_packed_width(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """As `any_width`, for a fused projection and convolved keys and values."""
    change_forward(attention, _attend_any_packed_width)


def _attend_any_packed_width(
    former: Forward, attention: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> mx.array:
    """As mlx-lm's baichuan_m1, for as many heads as there are."""
    last: Any = cache and cache[0]
    kv_cache: Any = cache and cache[1]
    offset = 0 if last is None else kv_cache.offset
    width = attention.num_heads * attention.head_dim
    kv_width = attention.num_kv_heads * attention.head_dim
    packed = mx.split(attention.W_pack(x), (width, width + kv_width), axis=-1)
    queries = _heads(packed[0], attention.num_heads)
    new = [_heads(y, attention.num_kv_heads) for y in packed[1:]]
    keys, values = (
        attention._custom_convolution(y, weights, state=last and last[i])
        for i, (y, weights) in enumerate(
            zip(new, (attention.conv_k, attention.conv_v), strict=True)
        )
    )
    queries, keys = (attention.rope(y, offset=offset) for y in (queries, keys))
    if last is not None:
        keys, values = kv_cache.update_and_fetch(keys, values)
        last[0], last[1] = (y[:, :, -1:] for y in new)
    mixed = scaled_dot_product_attention(
        queries, keys, values, cache=kv_cache, scale=attention.scale, mask=mask
    )
    return attention.o_proj(_flat(mixed))


def mask_of_batches(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Fit the mask of a batch to scores that have an axis more than it."""
    change_forward(attention, _attend_in_batches)


def _attend_in_batches(
    former: Forward, attention: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> mx.array:
    """As mlx-lm's gemma2, which has scores (B, KV heads, queries each, L, K).

    Without the axis a mask (B, 1, L, K) fits only a batch of as many prompts as there
    are KV heads, and then it masks the wrong ones.
    """
    if mask is not None and mask.ndim == 4 and attention.repeats > 1:
        mask = mx.expand_dims(mask, 2)
    return former(attention, x, mask, cache)


def mask_of_own_heads(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Take the rank's heads of a mask that is another one for every head.

    And refuse batches: in mlx-lm such a mask knows nothing of padding.
    """
    change_forward(attention, _attend_to_one_prompt)
    own = shards.parts[comm.rank].spans["q"].indices
    whole = SimpleNamespace(
        **{name: value for name, value in vars(attention).items() if "block" in name},
        n_heads=shards.counts["q"],
        n_kv_heads=shards.counts["kv"],
        n_q_per_kv=shards.counts["q"] // shards.counts["kv"],
    )
    mask = _MaskOfOwnHeads(whole, mx.array(own), shards.parts[comm.rank].size("kv"))
    change_forward(attention, mask, "_block_sparse_mask")


def _attend_to_one_prompt(
    former: Forward, attention: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> mx.array:
    """As mlx-lm's phi3small, which fails unless the prompts are as many as KV heads."""
    if mask is not None and mask.ndim == 4 and len(mask) > 1:
        raise ValueError(
            "phi3small reads one prompt at a time: the mask of a batch cannot be "
            "broadcast to the blocks of its sparse attention"
        )
    return former(attention, x, mask, cache)


@dataclass(frozen=True)
class _MaskOfOwnHeads:
    """Make the mask of all heads, with what is `whole`, and take the rank's own.

    Shapes: masks (KV heads, queries each, ...) -> (local KV heads, local queries
        each, ...).
    """

    whole: SimpleNamespace
    own: mx.array
    local_kv_heads: int

    def __call__(
        self,
        former: Callable[..., tuple[mx.array, ...]],
        attention: nn.Module,
        q_length: int,
        kv_length: int,
    ) -> tuple[mx.array, ...]:
        return tuple(
            mask.flatten(0, 1)[self.own].reshape(
                self.local_kv_heads, -1, *mask.shape[2:]
            )
            for mask in former(self.whole, q_length, kv_length)
        )


def count_groups(attention: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Number the rank's output groups from zero."""
    attention._group_ids = mx.arange(attention.o_groups)[None]

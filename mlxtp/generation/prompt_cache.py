"""Prompt caches that mlx-lm saved of a whole model, sharded for a rank."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
)

from mlxtp.comm.communicator import Communicator
from mlxtp.dryrun.caches import cache_arrays
from mlxtp.families.blocks import Heads
from mlxtp.generation.rows import leaves
from mlxtp.partition.spans import Spans
from mlxtp.sharding.table import SliceTable


@dataclass(frozen=True)
class SavedPrompt:
    """A file of mlx_lm.cache_prompt: the caches of a whole model, one for each layer.

    `model` and `tokenizer_config` are what they were made with.
    """

    caches: list[Any]
    model: str
    tokenizer_config: dict[str, Any]

    @classmethod
    def of_file(cls, file: Path) -> "SavedPrompt":
        """Open a file; its arrays are read when they are evaluated.

        Raises: ValueError if it is no file of mlx_lm.cache_prompt.
        """
        try:
            caches, metadata = load_prompt_cache(str(file), return_metadata=True)
            tokenizer_config = json.loads(metadata["tokenizer_config"])
            return cls(caches, metadata["model"], tokenizer_config)
        except Exception as error:  # MLX and mlx-lm name no errors for it
            raise ValueError(
                f"{file} is no prompt cache of mlx_lm.cache_prompt: {error}"
            ) from error

    def check_quantization(self, kv_bits: int | None, kv_group_size: int) -> None:
        """Compare how the caches are quantized with what is asked for.

        Raises: ValueError if bits or group size differ.
        """
        first = self.caches[0]
        if not isinstance(first, QuantizedKVCache):
            return
        if kv_bits not in (None, first.bits) or kv_group_size != first.group_size:
            raise ValueError(
                f"the prompt cache has {first.bits} bits in groups of "
                f"{first.group_size}; asked for: {kv_bits} in groups of {kv_group_size}"
            )

    def check_layers(self, model: nn.Module) -> None:
        """Compare the number of caches with that of a model, split or not.

        Raises: ValueError if they differ.
        """
        layers = len(make_prompt_cache(model))
        if layers != len(self.caches):
            raise ValueError(
                f"the prompt cache has {len(self.caches)} layers, the model {layers}"
            )

    def shard(self, model: nn.Module, comm: Communicator) -> list[Any]:
        """Keep this rank's heads and channels of the caches, for a sharded `model`.

        Shapes: keys and values (B, KV heads, L, D) -> (B, the rank's KV heads, L, D);
            states are cut on the axis on which the rank's own are shorter.

        Raises: UsageError if the caches are not of such a model.
        """
        with comm.agreement():
            self.check_layers(model)
        own = cache_arrays(model)
        axes = _ShardedAxes.of_rank(model.slice_table, comm.rank)
        with comm.agreement():
            for cache, like in zip(leaves(self.caches), leaves(own), strict=True):
                if isinstance(cache, ArraysCache):
                    axes.shard_states(cache, like)
                else:
                    axes.shard_keys_and_values(cache, like)
                mx.eval(list(_arrays(cache.state)))
        return self.caches


# An axis of the whole model's caches: its length, and the spans of it that a rank has.
_Axis = tuple[int, Spans]


@dataclass(frozen=True)
class _ShardedAxes:
    """The axes of caches that a rank has a part of, of all blocks of a model.

    `kv_heads` are those of keys and values, `states` those of what recurrent blocks
    keep or convolve. `has_latents` says that some blocks keep latents, which have one
    head that all ranks share.
    """

    kv_heads: tuple[_Axis, ...]
    states: tuple[_Axis, ...]
    has_latents: bool

    @classmethod
    def of_rank(cls, table: SliceTable, rank: int) -> "_ShardedAxes":
        """Read the axes from the slice table."""
        return cls(
            kv_heads=tuple(
                (shards.counts["kv"], shards.parts[rank].spans["kv"])
                for shards in table.blocks
                if isinstance(shards.block.rule, Heads) and not shards.block.rule.states
            ),
            states=tuple(
                (matrix.features, matrix.spans[rank])
                for matrix in table.matrices.values()
                if matrix.cut.style == "along"
            ),
            has_latents=any(
                getattr(shards.block.rule, "kv", None) == () for shards in table.blocks
            ),
        )

    def shard_keys_and_values(self, cache: Any, like: Any) -> None:
        """Keep the rank's KV heads of a cache, as many as its own cache `like` has.

        Raises: ValueError if no block of the model has so many heads.
        """
        local = next((x.shape[1] for x in _arrays(like.state) if x.ndim == 4), None)
        wholes = {whole for whole, spans in self.kv_heads if spans.length == local}
        may_be_whole = (
            not wholes or local in wholes or (self.has_latents and local == 1)
        )

        def shard(x: Any) -> Any:
            if not isinstance(x, mx.array) or x.ndim != 4:
                return x
            if x.shape[1] == local and may_be_whole:
                return x
            spans = _spans_of(self.kv_heads, x.shape[1], local)
            if spans is None:
                raise ValueError(
                    f"the prompt cache has {x.shape[1]} KV heads, the model "
                    f"{self.kv_heads[0][0] if self.kv_heads else 'none'}"
                )
            return _take(x, spans, axis=1)

        cache.state = tree_map(shard, cache.state)

    def shard_states(self, cache: ArraysCache, like: ArraysCache) -> None:
        """Keep the rank's heads or channels of a recurrent block's states.

        `like` is the rank's own cache: it shows which axis of a state is shorter.

        Raises: ValueError if no block of the model has such a state.
        """
        for index, (x, own) in enumerate(zip(cache.cache, like.cache, strict=True)):
            if x is None or x.shape[1:] == own.shape[1:]:
                continue
            axis = next(i for i in range(1, x.ndim) if x.shape[i] != own.shape[i])
            spans = _spans_of(self.states, x.shape[axis], own.shape[axis])
            if spans is None:
                raise ValueError(
                    f"the prompt cache has a state of the shape {x.shape}, the model "
                    f"none such"
                )
            cache[index] = _take(x, spans, axis)


def _spans_of(axes: Iterable[_Axis], whole: int, local: int | None) -> Spans | None:
    """The spans of an axis of `whole`, of which the rank has `local`, if there is one.

    Raises: ValueError if blocks of these two lengths are cut differently.
    """
    fitting = {
        tuple(spans.indices): spans
        for size, spans in axes
        if size == whole and spans.length == local
    }
    if len(fitting) > 1:
        raise ValueError(
            f"{local} of {whole} heads or channels of the prompt cache may be "
            f"{' or '.join(map(str, fitting))}: take other shares, or no prompt cache"
        )
    return next(iter(fitting.values()), None)


def _take(x: mx.array, spans: Spans, axis: int) -> mx.array:
    return mx.contiguous(mx.take(x, mx.array(spans.indices), axis))


def _arrays(state: Any) -> Iterator[mx.array]:
    return (x for _, x in tree_flatten(state) if isinstance(x, mx.array))

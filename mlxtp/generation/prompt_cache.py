"""Prompt caches that mlx-lm has saved, of which a rank takes its heads."""

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
    CacheList,
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
)

from mlxtp.comm.communicator import Communicator
from mlxtp.partition.spans import Spans


@dataclass(frozen=True)
class SavedPrompt:
    """What mlx_lm.cache_prompt wrote: caches of a whole model, and how it was made."""

    caches: list[Any]
    model: str
    tokenizer_config: dict[str, Any]

    @classmethod
    def of_file(cls, file: Path) -> "SavedPrompt":
        """Open a cache file; its arrays are read when they are needed.

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
        """Raise ValueError if the cache was quantized otherwise than asked for."""
        first = self.caches[0]
        if not isinstance(first, QuantizedKVCache):
            return
        if kv_bits not in (None, first.bits) or kv_group_size != first.group_size:
            raise ValueError(
                f"the prompt cache has {first.bits} bits in groups of "
                f"{first.group_size}; asked for: {kv_bits} in groups of {kv_group_size}"
            )

    def shard(self, model: nn.Module, comm: Communicator) -> list[Any]:
        """The caches of this rank's heads and channels, for a split `model`.

        Shapes: keys and values (B, KV heads, L, D) -> (B, local KV heads, L, D);
            states are cut on the axis on which the rank's own are shorter.

        Raises: UsageError if the caches are not of such a model.
        """
        own = make_prompt_cache(model)
        with comm.agreement():
            if len(own) != len(self.caches):
                raise ValueError(
                    f"the prompt cache has {len(self.caches)} layers, the model "
                    f"{len(own)}"
                )
        # A few tokens show the shapes that the rank's caches have.
        mx.eval(model(mx.zeros((1, 8), mx.int32), cache=own))
        axes = _CutAxes.of_model(model, comm.rank)
        with comm.agreement():
            for cache, mine in zip(_leaves(self.caches), _leaves(own), strict=True):
                is_state = isinstance(cache, ArraysCache)
                (axes.cut_states if is_state else axes.cut_keys)(cache, mine)
                mx.eval(list(_arrays(cache.state)))
        return self.caches


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches that hold arrays, those within lists too."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _leaves(cache.caches)
        else:
            yield cache


@dataclass(frozen=True)
class _CutAxes:
    """The axes that caches are cut on, as (whole length, the rank's spans).

    `heads` are those of keys and values, `states` those of what recurrent blocks keep
    or convolve. `has_latents` says that there may be latents besides, which have one
    head for all.
    """

    heads: tuple[tuple[int, Spans], ...]
    states: tuple[tuple[int, Spans], ...]
    has_latents: bool

    @classmethod
    def of_model(cls, model: nn.Module, rank: int) -> "_CutAxes":
        table = model.slice_table
        return cls(
            tuple(
                (shards.counts["kv"], shards.parts[rank].spans["kv"])
                for shards in table.blocks
                if "kv" in shards.counts
            ),
            tuple(
                (matrix.features, matrix.spans[rank])
                for matrix in table.matrices.values()
                if matrix.cut.style == "along"
            ),
            any(
                getattr(shards.block.rule, "kv", None) == () for shards in table.blocks
            ),
        )

    def cut_keys(self, cache: Any, mine: Any) -> None:
        """Keep the rank's KV heads of a cache of keys and values."""
        local = next((x.shape[1] for x in _arrays(mine.state) if x.ndim == 4), None)
        wholes = {size for size, spans in self.heads if spans.length == local}
        uncut = not wholes or local in wholes or (self.has_latents and local == 1)

        def cut(x: Any) -> Any:
            if not isinstance(x, mx.array) or x.ndim != 4:
                return x
            if x.shape[1] == local and uncut:
                return x
            spans = _find(self.heads, x.shape[1], local)
            if spans is None:
                raise ValueError(
                    f"the prompt cache has {x.shape[1]} KV heads, the model "
                    f"{self.heads[0][0] if self.heads else 'none'}"
                )
            return _take(x, spans, axis=1)

        cache.state = tree_map(cut, cache.state)

    def cut_states(self, cache: ArraysCache, mine: ArraysCache) -> None:
        """Keep the rank's heads or channels of the states of a recurrent block."""
        for index, (x, like) in enumerate(zip(cache.cache, mine.cache, strict=True)):
            if x is None or x.shape[1:] == like.shape[1:]:
                continue
            axis = next(i for i in range(1, x.ndim) if x.shape[i] != like.shape[i])
            spans = _find(self.states, x.shape[axis], like.shape[axis])
            if spans is None:
                raise ValueError(
                    f"the prompt cache has a state of the shape {x.shape}, the model "
                    f"none such"
                )
            cache[index] = _take(x, spans, axis)


def _find(
    axes: Iterable[tuple[int, Spans]], whole: int, local: int | None
) -> Spans | None:
    return next(
        (spans for size, spans in axes if size == whole and spans.length == local),
        None,
    )


def _take(x: mx.array, spans: Spans, axis: int) -> mx.array:
    return mx.contiguous(mx.take(x, mx.array(spans.indices), axis))


def _arrays(state: Any) -> Iterator[mx.array]:
    return (x for _, x in tree_flatten(state) if isinstance(x, mx.array))

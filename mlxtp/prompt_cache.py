"""Prompt caches that mlx-lm has saved, of which a rank takes its KV heads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache

from mlxtp.communicator import Communicator


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
        """The caches of this rank's KV heads, for a `model` that `load` has split.

        Shapes: keys and values (B, KV heads, L, D) -> (B, local KV heads, L, D).

        Raises: ValueError if the caches are not of such a model.
        """
        heads = list(model.slice_table.heads.values())
        if len(heads) != len(self.caches):
            raise ValueError(
                f"the prompt cache has {len(self.caches)} layers, "
                f"the model {len(heads)}"
            )
        for cache, shards in zip(self.caches, heads, strict=True):
            num_kv_heads = 1 + max(kv for shard in shards for kv in shard.kv_heads)
            local = mx.array(shards[comm.rank].kv_heads)

            def mine(
                x: Any, num_kv_heads: int = num_kv_heads, local: mx.array = local
            ) -> Any:
                if not isinstance(x, mx.array) or x.ndim != 4:
                    return x
                if x.shape[1] != num_kv_heads:
                    raise ValueError(
                        f"the prompt cache has {x.shape[1]} KV heads, the model "
                        f"{num_kv_heads}"
                    )
                return mx.contiguous(x[:, local])

            cache.state = tree_map(mine, cache.state)
            mx.eval(cache.state)
        return self.caches

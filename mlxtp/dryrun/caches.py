"""The caches of a split model, known without reading weights and without sending."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

# Caches get room for so many tokens at once, so contexts are compared in such steps.
CONTEXT_STEP = KVCache.step


def cache_arrays(model: nn.Module, *, batch: int = 1, tokens: int = 8) -> list[Any]:
    """Return this rank's caches after `tokens` tokens, one a layer, as mlx-lm has them.

    Their arrays are in MLX's graph and are not to be evaluated: ask them for shapes and
    dtypes.

    Args:
        model: a split model, as `mlxtp.load` returns it.
        batch: sequences at once (B).
        tokens: tokens of each sequence (L).

    Shapes: keys and values (B, the rank's KV heads, L, D); states as the rank has them.
    Communicates: nothing, so one rank alone can ask.
    """
    caches: list[Any] = make_prompt_cache(model)
    with model.comm.dry_run():
        model(mx.zeros((batch, tokens), mx.int32), cache=caches)
    return caches

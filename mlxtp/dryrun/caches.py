"""The caches of a rank's model, known without weights and without collectives."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxtp.dryrun.passes import become_rank
from mlxtp.model.skeleton import EmptyModel
from mlxtp.sharding.table import SliceTable


def cache_arrays(
    empty: EmptyModel, table: SliceTable, rank: int, *, batch: int = 1, tokens: int = 8
) -> list[Any]:
    """Return a rank's caches after `tokens` tokens, one a layer, as mlx-lm makes them.

    Their arrays are in MLX's graph and hold zeros: ask them for shapes and dtypes.

    Args:
        empty: a freshly built model. It becomes the rank's and is of no other use.
        table: the slice table, as a loaded model has it in `model.slice_table`.
        rank: whose caches.
        batch: sequences at once (B).
        tokens: tokens of each sequence (L).

    Shapes: keys and values (B, the rank's KV heads, L, D); states as the rank has them.
    Communicates: nothing, so one rank alone can ask for any.
    """
    become_rank(empty, table, rank)
    caches: list[Any] = make_prompt_cache(empty.model)
    empty.model(mx.zeros((batch, tokens), mx.int32), cache=caches)
    return caches

"""Whether a model's caches can stand in a batch."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxtp.generation.rows import Rows
from mlxtp.layers.sums import outputs_unread


def reason_against_batches(model: nn.Module) -> str | None:
    """Say why several requests cannot decode together; None if they can.

    mlx-lm has no batches of some caches, and refuses those of some types. It is tried
    on two rows of different lengths, without computing anything.

    Args:
        model: a split model, as `mlxtp.load` returns it.

    Communicates: nothing.
    """
    rows = Rows()
    try:
        with model.comm.dry_run():
            caches = []
            for tokens in (3, 5):
                caches.append(make_prompt_cache(model))
                with outputs_unread():
                    model(mx.zeros((1, tokens), mx.int32), cache=caches[-1])
            rows.join(["short", "long"], caches)
            model(mx.zeros((2, 1), mx.int32), cache=rows.caches)
    except Exception as error:  # mlx-lm and its models name none
        return f"{type(error).__name__}: {error}"
    return None

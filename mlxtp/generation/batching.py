"""Whether a model's caches can stand in a batch, and be taken back there."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxtp.generation.rows import Rows
from mlxtp.layers.sums import outputs_unread

# Types whose rows get other tokens in mlx-lm's batches than alone: what fills up a
# shorter row counts there.
INEXACT = {
    "afm7": "layers that take over keys count the places of the longest row",
    "minimax_m3_vl": "blocks of keys are chosen by the places of the longest row",
}


def reason_against_batches(model: nn.Module) -> str | None:
    """Say why several requests cannot decode together; None if they can.

    mlx-lm has no batches of some caches, and refuses those of some types. It is tried
    on rows of different lengths that come and go, without computing anything.

    Args:
        model: a split model, as `mlxtp.load` returns it.

    Communicates: nothing.
    """
    if (reason := INEXACT.get(getattr(model, "model_type", ""))) is not None:
        return reason
    rows = Rows()
    try:
        with model.comm.dry_run():
            for name, tokens in (("a", 3), ("b", 5), ("c", 4)):
                caches = make_prompt_cache(model)
                with outputs_unread():
                    model(mx.zeros((1, tokens), mx.int32), cache=caches)
                rows.join([name], [caches])
                model(mx.zeros((len(rows.ids), 1), mx.int32), cache=rows.caches)
            rows.extract("b")
            rows.drop(["a"])
            model(mx.zeros((2, 1), mx.int32), cache=rows.caches)
    except Exception as error:  # mlx-lm and its models name none
        return f"{type(error).__name__}: {error}"
    return None


def can_draft_in_batches(model: nn.Module) -> bool:
    """Whether rows of a batch can be taken back, each behind drafts of its own.

    It is tried as batches are. `model` is one whose requests can decode together.

    Communicates: nothing.
    """
    rows = Rows()
    try:
        with model.comm.dry_run():
            for name, tokens in (("a", 3), ("b", 5)):
                caches = make_prompt_cache(model)
                with outputs_unread():
                    model(mx.zeros((1, tokens), mx.int32), cache=caches)
                rows.join([name], [caches])
            if not rows.can_take_back:
                return False
            rows.prepare()
            model(mx.zeros((2, 3), mx.int32), cache=rows.caches)
            rows.take_back([2, 0])
            model(mx.zeros((2, 1), mx.int32), cache=rows.caches)
    except Exception:  # mlx-lm and its models name none
        return False
    return True

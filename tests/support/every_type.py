"""What the tests of all model types share."""

import mlx.core as mx
import numpy as np
import zoo
from reference import as_numpy

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]

# Of the largest logit, in float32: what the order of a sum makes of it.
TOLERANCE = 2e-4
# Where something is rounded to 16 bits or fewer on the way, a step of that.
ROUNDED_TOLERANCE = 3e-2

# Worlds in which the heads of `zoo` can be shared out evenly.
EVEN_WORLDS = (1, 2, 3, 5)

RUNNABLE = [t for t in zoo.model_types() if t not in zoo.UNAVAILABLE]


# One of each kind of block, for a quick run: the table's commonest family, fused
# projections, segments by head, latents, experts, state spaces, linear attention, short
# convolutions, wide norms, keys of other layers, packed ternary layers.
REPRESENTATIVES = [
    *("llama", "bailing_moe", "gpt_neox", "deepseek_v3", "gpt_oss", "mamba2"),
    *("qwen3_next", "jamba", "lfm2", "olmo2", "gemma3n", "bitnet", "gemma3_text"),
]


def check_logits(
    model_type: str, logits: list[mx.array], expected: list[np.ndarray]
) -> None:
    """Compare logits with those of one process."""
    tolerance = ROUNDED_TOLERANCE if model_type in zoo.BFLOAT16 else TOLERANCE
    for got, wanted in zip(logits, expected, strict=True):
        finite = np.isfinite(wanted)
        error = np.abs(as_numpy(got)[finite] - wanted[finite]).max()
        assert error <= tolerance * np.abs(wanted[finite]).max()

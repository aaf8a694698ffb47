"""Small models, and what mlx-lm makes of them in one process."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from equal import Tokens
from mlx_lm.generate import generate_step
from tiny import Tiny

from mlxtp import Communicator

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32]
STEPS = 32


# How far logits may be from mlx-lm's, as a fraction of the largest. A sum over ranks
# rounds otherwise than a sum in one matrix product: a few units in the last place
# (2^-23, 2^-10, 2^-7), which two layers and the head carry on.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def heads(num_heads: int, num_kv_heads: int, **more: Any) -> dict[str, Any]:
    """A part of a config: so many query heads and KV heads, and what else is given."""
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        **more,
    }


def quantized(bits: int, group_size: int, mode: str = "affine") -> Tiny:
    """A model whose heads do not end where groups end, and with few granules."""
    wide = {"hidden_size": 128, "head_dim": 48, "intermediate_size": 384}
    per_layer = None
    if mode != "affine":
        # These modes embed in bfloat16, where equal tokens cannot be asked for.
        def per_layer(path: str, module: nn.Module) -> bool:
            return "embed" not in path

    return Tiny(
        heads(8, 2, **wide),
        quantization={"bits": bits, "group_size": group_size, "mode": mode},
        per_layer=per_layer,
    )


def mixed_bits(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """Quantize the first layer with 8 bits, and no projection of values elsewhere."""
    if "layers.0" in path:
        return {"bits": 8, "group_size": 32}
    return "v_proj" not in path


QWEN2_HEADS = heads(14, 2, model_type="qwen2", hidden_size=14 * 8, head_dim=8)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


MODELS: dict[str, Tiny] = {
    "llama-8-8": Tiny(heads(8, 8)),
    "llama-8-4-tied": Tiny(heads(8, 4, tie_word_embeddings=True)),
    "llama-8-2-biases": Tiny(heads(8, 2, attention_bias=True, mlp_bias=True)),
    "llama-14-2-rope": Tiny(heads(14, 2, hidden_size=14 * 8, rope_scaling=LLAMA3_ROPE)),
    "llama-5-1-tied": Tiny(heads(5, 1, hidden_size=80, tie_word_embeddings=True)),
    "llama-40-8": Tiny(heads(40, 8, hidden_size=80, head_dim=4)),
    "llama-64-4": Tiny(heads(64, 4, head_dim=4)),
    "llama-sliding": Tiny(
        heads(
            8,
            2,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=6,
        )
    ),
    "mistral-8-4": Tiny(heads(8, 4, model_type="mistral")),
    "qwen2-14-2": Tiny(QWEN2_HEADS),
    "qwen2-14-2-tied": Tiny({**QWEN2_HEADS, "tie_word_embeddings": True}),
    "qwen3-8-2": Tiny(heads(8, 2, model_type="qwen3")),
    "qwen3-64-4-tied": Tiny(
        heads(64, 4, model_type="qwen3", head_dim=4, tie_word_embeddings=True)
    ),
    **{
        f"affine-{bits}-{group_size}": quantized(bits, group_size)
        for bits in (2, 3, 4, 5, 6, 8)
        for group_size in (32, 64, 128)
    },
    "affine-tied": Tiny(
        heads(8, 2, tie_word_embeddings=True),
        quantization={"bits": 4, "group_size": 32},
    ),
    "qwen2-quantized-biases": Tiny(
        {**QWEN2_HEADS, "hidden_size": 14 * 32},
        quantization={"bits": 4, "group_size": 64},
    ),
    "mxfp4": quantized(4, 32, "mxfp4"),
    "nvfp4": quantized(4, 16, "nvfp4"),
    "mxfp8": quantized(8, 32, "mxfp8"),
    "mixed-bits": Tiny(
        heads(8, 2), quantization={"bits": 4, "group_size": 64}, per_layer=mixed_bits
    ),
    "float16": Tiny(heads(8, 2), dtype=mx.float16),
    "bfloat16": Tiny(heads(8, 2), dtype=mx.bfloat16),
    "bfloat16-quantized": Tiny(
        heads(8, 2), dtype=mx.bfloat16, quantization={"bits": 4, "group_size": 32}
    ),
}


def greedy(model: nn.Module) -> Tokens:
    """The likeliest tokens behind `PROMPT`, (STEPS,)."""
    return Tokens.of(generate_step(mx.array(PROMPT), model, max_tokens=STEPS))


def on_rank_0(comm: Communicator, compute: Callable[[], Any]) -> Any:
    """Compute the reference in one process, rank 0's, and give it to all ranks.

    Raises: ValueError, on all ranks, if that fails.
    """
    result: Any = None
    with comm.agreement():
        try:
            result = compute() if comm.rank == 0 else None
        except Exception as error:
            raise ValueError(f"the reference failed: {error!r}") from error
    return comm.bcast_object(result)


def as_numpy(x: mx.array) -> np.ndarray:
    """An array of MLX, of any floating dtype, as float32 for numpy."""
    return np.array(x.astype(mx.float32))

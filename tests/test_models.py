"""A split model computes what mlx-lm computes in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32]
STEPS = 32

# How far logits may be from mlx-lm's, as a share of the largest. A sum over ranks
# rounds otherwise than a sum in one matrix product: a few units in the last place
# (2^-23, 2^-10, 2^-7), which two layers and the head carry on.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def heads(num_heads: int, num_kv_heads: int, **more: Any) -> dict[str, Any]:
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


def greedy(model: nn.Module) -> list[int]:
    return [
        token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=STEPS)
    ]


def sampled(model: nn.Module) -> list[int]:
    mx.random.seed(7)
    sampler = make_sampler(temp=0.9, top_p=0.95, min_p=0.02, top_k=40)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=STEPS, sampler=sampler)
    return [token for token, _ in steps]


def on_rank_0(comm: Communicator, compute: Callable[[], Any]) -> Any:
    """What one machine says, computed once and told to all."""
    said: Any = None
    with comm.agreement():
        try:
            said = compute() if comm.rank == 0 else None
        except Exception as error:
            raise ValueError(f"the reference failed: {error!r}") from error
    return comm.bcast(said)


def as_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def reference(folder: Path) -> dict[str, Any]:
    model, _ = mlx_lm.load(str(folder))
    return {
        "logits": as_numpy(model(mx.array([PROMPT]))),
        "greedy": greedy(model),
        "sampled": sampled(model),
    }


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_process(name: str, comm: Communicator, shared_path: Path) -> None:
    tiny = MODELS[name]
    folder = made_by_rank_0(tiny, shared_path / name, comm)
    expected = on_rank_0(comm, lambda: reference(folder))
    num_heads = tiny.full_config()["num_attention_heads"]
    if comm.size > num_heads:
        with pytest.raises(ValueError, match=f"start at most {num_heads} ranks"):
            mlxtp.load(folder, comm)
        return
    model, _ = mlxtp.load(folder, comm)
    logits = model(mx.array([PROMPT]))

    assert len(set(comm.allgather_objects(as_numpy(logits).tobytes()))) == 1
    error = np.abs(as_numpy(logits) - expected["logits"]).max()
    assert error <= TOLERANCE[tiny.dtype] * np.abs(expected["logits"]).max()
    if tiny.dtype == mx.float32:
        assert greedy(model) == expected["greedy"]
        assert sampled(model) == expected["sampled"]
        assert len(set(expected["greedy"])) > 4, "too dull to show anything"


def test_stream_generate_skips_only_what_nobody_reads(
    comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(
        MODELS["llama-8-4-tied"], shared_path / "llama-8-4-tied", comm
    )
    model, tokenizer = mlxtp.load(folder, comm)
    plain = greedy(model)
    plain_bytes = comm.traffic.bytes
    for step_size in (3, 2048):
        comm.traffic.bytes = 0
        responses = list(
            mlxtp.stream_generate(
                model, tokenizer, PROMPT, max_tokens=STEPS, prefill_step_size=step_size
            )
        )
        tokens = [response.token for response in responses]
        assert tokens == plain[: len(tokens)]
        assert comm.size == 1 or 0 < comm.traffic.bytes < plain_bytes
    # Closed in the middle of the prompt, the next call is whole again.
    stream = mlxtp.stream_generate(
        model,
        tokenizer,
        PROMPT,
        prefill_step_size=2,
        prompt_progress_callback=_stop_at_half,
    )
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert greedy(model) == plain


def _stop_at_half(processed: int, total: int) -> None:
    if processed > total // 2:
        raise KeyboardInterrupt


def test_unequal_weights(comm: Communicator, shared_path: Path) -> None:
    folder = made_by_rank_0(MODELS["llama-64-4"], shared_path / "llama-64-4", comm)
    expected = on_rank_0(comm, lambda: reference(folder)["greedy"])
    weights = [3, *[1] * (comm.size - 1)]
    model, _ = mlxtp.load(folder, comm, weights=weights)
    assert greedy(model) == expected
    held = comm.allgather_objects(
        sum(p.size for _, p in nn.utils.tree_flatten(model.parameters()))
    )
    if comm.size > 1:
        assert held[0] > 1.5 * max(held[1:])


def test_mlx_lm_takes_the_model_unchanged(
    comm: Communicator, shared_path: Path
) -> None:
    """batch_generate and speculative decoding, with a draft that is split too."""
    folder = made_by_rank_0(MODELS["qwen3-8-2"], shared_path / "qwen3-8-2", comm)
    draft_folder = made_by_rank_0(
        MODELS["llama-8-4-tied"], shared_path / "llama-8-4-tied", comm
    )
    prompts = [PROMPT, PROMPT[:4], [*PROMPT, 5, 6]]

    def both(model: nn.Module, draft: nn.Module, tokenizer: Any) -> Any:
        batch = mlx_lm.batch_generate(
            model, tokenizer, prompts, max_tokens=10, return_token_ids=True
        )
        drafted = [
            (response.token, response.from_draft)
            for response in mlx_lm.stream_generate(
                model, tokenizer, PROMPT, draft_model=draft, max_tokens=STEPS
            )
        ]
        return batch.token_ids, drafted

    def alone() -> Any:
        model, tokenizer = mlx_lm.load(str(folder))
        return both(model, mlx_lm.load(str(draft_folder))[0], tokenizer)

    model, tokenizer = mlxtp.load(folder, comm)
    draft, _ = mlxtp.load(draft_folder, comm)
    assert both(model, draft, tokenizer) == on_rank_0(comm, alone)

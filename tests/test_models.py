"""A split model computes what mlx-lm computes in one process."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from eager import over_eager
from equal import Tokens
from kept import kept, kept_model
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from pyramid import sweep
from reference import MODELS, PROMPT, STEPS, TOLERANCE, as_numpy, greedy

import mlxtp
from mlxtp import Communicator

# One of each: shared keys and values, biases and rope, unequal heads, sliding windows,
# more heads than anything divides, each kind of packing, narrow floats.
QUICK = [
    *("llama-8-4-tied", "llama-14-2-rope", "llama-5-1-tied", "llama-sliding"),
    *("qwen3-64-4-tied", "affine-4-64", "affine-tied", "mixed-bits", "mxfp4"),
    *("bfloat16", "bfloat16-quantized"),
]


def sampled(model: nn.Module) -> list[int]:
    mx.random.seed(7)
    sampler = make_sampler(temp=0.9, top_p=0.95, min_p=0.02, top_k=40)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=STEPS, sampler=sampler)
    return [token for token, _ in steps]


def reference(folder: Path) -> dict[str, Any]:
    model, _ = mlx_lm.load(str(folder))
    return {
        "logits": as_numpy(model(mx.array([PROMPT]))),
        "greedy": greedy(model),
        "sampled": sampled(model),
    }


@pytest.mark.parametrize("name", sweep(MODELS, QUICK))
def test_equals_one_process(name: str, comm: Communicator) -> None:
    tiny = MODELS[name]
    folder = kept_model(comm, name)
    expected = kept(comm, f"{name}-steps", lambda _: reference(folder))
    num_heads = tiny.full_config()["num_attention_heads"]
    if comm.size > num_heads:
        with pytest.raises(ValueError, match=f"start at most {num_heads} ranks"):
            mlxtp.load(folder, comm)
        return
    model, _ = mlxtp.load(folder, comm)
    logits = model(mx.array([PROMPT]))

    assert len(set(comm.allgather_object(as_numpy(logits).tobytes()))) == 1
    error = np.abs(as_numpy(logits) - expected["logits"]).max()
    assert error <= TOLERANCE[tiny.dtype] * np.abs(expected["logits"]).max()
    with over_eager(comm):
        assert mx.array_equal(model(mx.array([PROMPT])), logits)
        if tiny.dtype == mx.float32 and name in QUICK:
            assert greedy(model) == expected["greedy"]
    if tiny.dtype == mx.float32:
        assert greedy(model) == expected["greedy"]
        assert sampled(model) == expected["sampled"]
        assert len(set(expected["greedy"])) > 4, "too dull to show anything"


@pytest.mark.usefixtures("each_mpi")
def test_stream_generate_skips_only_what_nobody_reads(
    comm: Communicator,
) -> None:
    folder = kept_model(comm, "llama-8-4-tied")
    model, tokenizer = mlxtp.load(folder, comm)
    plain = greedy(model)
    plain_bytes = comm.traffic.bytes
    for step_size in (3, 2048):
        comm.traffic.bytes = 0
        responses = mlxtp.stream_generate(
            model, tokenizer, PROMPT, max_tokens=STEPS, prefill_step_size=step_size
        )
        tokens = Tokens.of((said.token, said.logprobs) for said in responses)
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


def test_unequal_shares(comm: Communicator) -> None:
    folder = kept_model(comm, "llama-64-4")
    expected = kept(comm, "llama-64-4-steps", lambda _: reference(folder))["greedy"]
    shares = [3, *[1] * (comm.size - 1)]
    model, _ = mlxtp.load(folder, comm, shares=shares)
    assert greedy(model) == expected
    held = comm.allgather_object(
        sum(p.size for _, p in nn.utils.tree_flatten(model.parameters()))
    )
    if comm.size > 1:
        assert held[0] > 1.5 * max(held[1:])


@pytest.mark.usefixtures("each_mpi")
def test_mlx_lm_takes_the_model_unchanged(comm: Communicator) -> None:
    """batch_generate and speculative decoding, with a draft that is split too."""
    folder = kept_model(comm, "qwen3-8-2")
    draft_folder = kept_model(comm, "llama-8-4-tied")
    prompts = [PROMPT, PROMPT[:4], [*PROMPT, 5, 6]]

    def both(model: nn.Module, draft: nn.Module, tokenizer: Any) -> Any:
        batch = mlx_lm.batch_generate(
            model, tokenizer, prompts, max_tokens=10, return_token_ids=True
        )
        drafted = list(
            mlx_lm.stream_generate(
                model, tokenizer, PROMPT, draft_model=draft, max_tokens=STEPS
            )
        )
        tokens = Tokens.of((said.token, said.logprobs) for said in drafted)
        return batch.token_ids, tokens, [said.from_draft for said in drafted]

    def alone() -> Any:
        model, tokenizer = mlx_lm.load(str(folder))
        return both(model, mlx_lm.load(str(draft_folder))[0], tokenizer)

    model, tokenizer = mlxtp.load(folder, comm)
    draft, _ = mlxtp.load(draft_folder, comm)
    expected = kept(comm, "qwen3-8-2-batch-and-drafts", lambda _: alone())
    assert both(model, draft, tokenizer) == expected

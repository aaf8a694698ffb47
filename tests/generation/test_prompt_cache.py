"""Caches that mlx-lm saved are continued, each rank with its own heads."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from reference import MODELS, PROMPT, STEPS, heads, on_rank_0
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.generation.prompt_cache import SavedPrompt

SUFFIX = mx.array([11, 22, 33])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quantized": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
    "rotating": {"max_kv_size": 6},
}


def continued(model: Any, caches: list[Any], **options: Any) -> list[int]:
    options.pop("max_kv_size", None)
    steps = generate_step(
        SUFFIX, model, prompt_cache=caches, max_tokens=STEPS, **options
    )
    return [token for token, _ in steps]


@pytest.mark.parametrize("kind", KINDS)
def test_continues_like_one_process(
    kind: str, comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(
        Tiny(heads(14, 2, hidden_size=14 * 8, head_dim=32)), shared_path / "kv", comm
    )
    file = shared_path / f"{kind}.safetensors"
    options = KINDS[kind]

    def save_and_continue() -> list[int]:
        model, _ = mlx_lm.load(str(folder))
        caches = make_prompt_cache(model, options.get("max_kv_size"))
        more = {k: v for k, v in options.items() if k != "max_kv_size"}
        for _ in generate_step(
            mx.array(PROMPT), model, max_tokens=0, prompt_cache=caches, **more
        ):
            pass
        metadata = {"model": str(folder), "tokenizer_config": json.dumps({})}
        save_prompt_cache(str(file), caches, metadata)
        return continued(model, caches, **options)

    expected = on_rank_0(comm, save_and_continue)
    model, _ = mlxtp.load(folder, comm)
    saved = SavedPrompt.of_file(file)
    assert saved.model == str(folder)
    caches = saved.shard(model, comm)
    local = model.layers[0].self_attn.n_kv_heads
    shapes = {x.shape[1] for c in caches for x in _arrays(c.state) if x.ndim == 4}
    assert shapes == {local}
    assert continued(model, caches, **options) == expected


def _arrays(state: Any) -> list[mx.array]:
    if isinstance(state, mx.array):
        return [state]
    if isinstance(state, list | tuple):
        return [x for part in state for x in _arrays(part)]
    return []


def test_what_is_no_cache_of_this_model(comm: Communicator, shared_path: Path) -> None:
    folder = made_by_rank_0(MODELS["llama-8-8"], shared_path / "llama-8-8", comm)
    other = made_by_rank_0(
        MODELS["llama-8-4-tied"], shared_path / "llama-8-4-tied", comm
    )
    file = shared_path / "other.safetensors"

    def save() -> None:
        model, _ = mlx_lm.load(str(other))
        caches = make_prompt_cache(model)
        model(mx.array([PROMPT]), cache=caches)
        metadata = {"model": "m", "tokenizer_config": "{}"}
        save_prompt_cache(str(file), caches, metadata)
        save_prompt_cache(str(shared_path / "short.safetensors"), caches[:1], metadata)
        save_prompt_cache(str(shared_path / "no-metadata.safetensors"), caches)

    on_rank_0(comm, save)
    model, _ = mlxtp.load(folder, comm)
    with pytest.raises(ValueError, match="has 4 KV heads, the model 8"):
        SavedPrompt.of_file(file).shard(model, comm)
    with pytest.raises(ValueError, match="has 1 layers, the model 2"):
        SavedPrompt.of_file(shared_path / "short.safetensors").shard(model, comm)
    for broken in ("no-metadata.safetensors", "absent.safetensors", "llama-8-8"):
        with pytest.raises(ValueError, match="is no prompt cache of"):
            SavedPrompt.of_file(shared_path / broken)

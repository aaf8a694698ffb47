"""Caches that mlx-lm saved are continued, each rank with its own heads."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import zoo
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from reference import MODELS, PROMPT, STEPS, heads, on_rank_0
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.families.attention import ATTENTION
from mlxtp.families.recurrent import MAMBA2_GROUP_NORM
from mlxtp.generation.prompt_cache import SavedPrompt, _ShardedAxes, _spans_of
from mlxtp.partition.shares import Shares
from mlxtp.partition.spans import Spans
from mlxtp.plan.model import model_of_config
from mlxtp.sharding.decide import slice_table

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


@pytest.mark.once
def test_a_state_space_says_nothing_of_keys_and_values() -> None:
    """Its groups are as many as the KV heads, and others than those of a rank."""
    config = zoo.build("nemotron_h")[1] | {
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8},
        **{"mamba_num_heads": 32, "n_groups": 8, "mamba_head_dim": 8},
    }
    with model_of_config("hybrid", config, 16) as model:
        table = slice_table(model.build().model, Shares.parse("queries=1,1,1,1,1"))
    groups, heads = (
        next(s for s in table.blocks if "kv" in s.counts and s.block.name == name)
        for name in (MAMBA2_GROUP_NORM.name, ATTENTION.name)
    )
    assert groups.parts[2].spans["kv"] != heads.parts[2].spans["kv"]
    axes = _ShardedAxes.of_rank(table, 2)
    assert _spans_of(axes.kv_heads, 8, 2) == Spans([(3, 4), (4, 5)])
    differing = [(8, Spans([(3, 5)])), (8, Spans([(4, 6)]))]
    with pytest.raises(ValueError, match=r"may be \(3, 4\) or \(4, 5\)"):
        _spans_of(differing, 8, 2)
    assert _spans_of(differing[:1] * 2, 8, 2) == Spans([(3, 5)])

"""What mlx-lm's loops raise is known before a weight is read, and costs no memory."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import zoo
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny import Tiny, save_tokenizer

import mlxtp
from mlxtp.dryrun.loops import try_options
from mlxtp.generation.rollback import Point
from mlxtp.model.skeleton import unloaded
from mlxtp.sharding.decide import slice_table

pytestmark = pytest.mark.once
use_plain_operations()

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32]
QUANTIZED: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32}
# Of mlx-lm's own code: types whose caches differ, in states, latents and windows; dbrx,
# whose forward pass reads values; kimi_k3, which keeps what it computes of weights.
TYPES = ["glm", "gemma3_text", "mamba2", "lfm2", "deepseek_v3", "dbrx", "kimi_k3"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


def attempt(
    tokenizer: TokenizerWrapper,
    *models: nn.Module,
    length: int = len(PROMPT) + 16,
    **options: Any,
) -> str:
    """What a dry run raises."""
    tables = [(model, slice_table(model, [1])) for model in models]
    try:
        try_options(
            mlxtp.stream_generate,
            tables,
            tokenizer,
            {"max_tokens": 16, **options},
            token=3,
            length=length,
        )
    except Exception as error:
        return repr(error)
    return ""


def responses(*args: Any, **options: Any) -> list[GenerationResponse]:
    return list(mlx_lm.stream_generate(*args, max_tokens=16, **options))


@pytest.mark.parametrize("model_type", TYPES)
def test_raises_what_mlx_lm_raises(
    model_type: str, tokenizer: TokenizerWrapper
) -> None:
    model, _ = zoo.build(model_type)
    draft, _ = zoo.build("glm")
    eval_, ends = mx.eval, tokenizer.eos_token_ids
    arrays = [id(array) for _, array in tree_flatten(model.parameters())]
    for options in [{}, QUANTIZED, {"max_kv_size": 8}]:
        said = ""
        try:
            given = {"prefill_step_size": 4, "quantized_kv_start": 0} | options
            responses(model, tokenizer, mx.array(PROMPT), **given)
        except Exception as error:
            said = repr(error)
        assert bool(attempt(tokenizer, model, **options)) == bool(said), said
    # Whatever its caches are, drafts are taken back, at the start and at the end.
    assert not attempt(tokenizer, model, draft)
    assert not attempt(tokenizer, draft, model)
    assert not attempt(tokenizer, model, draft_model="ngram")
    # Nothing is left behind.
    assert (mx.eval, tokenizer.eos_token_ids) == (eval_, ends)
    assert [id(array) for _, array in tree_flatten(model.parameters())] == arrays


def test_options_of_sampling_and_drafts(tokenizer: TokenizerWrapper) -> None:
    model, _ = zoo.build("glm")
    sliding = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 40,
    }
    window = unloaded(Tiny(sliding).full_config())
    for options in [{"top_k": 131}, {"min_p": 0.1, "min_tokens_to_keep": 132}]:
        assert attempt(tokenizer, model, sampler=make_sampler(1.0, **options), seed=3)
    sampler = make_sampler(1.0, top_k=130, xtc_probability=1.0)
    assert not attempt(tokenizer, model, sampler=sampler, seed=3)
    assert not attempt(tokenizer, model, model, max_tokens=-1)
    assert not attempt(tokenizer, model, max_tokens=-1)
    # A window takes drafts back, full or not.
    for length in (40, 20):
        assert not attempt(tokenizer, window, model, length=length)


def test_drafts_are_rejected_and_taken_back(
    tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what a cache raises when it is taken back is known before."""
    model, _ = zoo.build("gemma3_text")

    def refuse(self: Point, rejected: int) -> bool:
        if rejected:
            raise NotImplementedError(f"{rejected} of these")
        return True

    monkeypatch.setattr(Point, "take_back", refuse)
    for given in ([model, model], [model]):
        options = {} if len(given) > 1 else {"draft_model": "ngram"}
        said = attempt(tokenizer, *given, **options)
        assert said == ("NotImplementedError('1 of these')" if len(given) > 1 else "")


def test_costs_no_memory(tokenizer: TokenizerWrapper) -> None:
    """Each matrix would take 16 MB."""
    wide = {"hidden_size": 1 << 11, "intermediate_size": 1 << 11, "head_dim": 1 << 8}
    model = unloaded(Tiny(wide).full_config())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    sampler = make_sampler(1.0, top_p=0.9)
    assert not attempt(
        tokenizer, model, model, length=64, sampler=sampler, seed=1, **QUANTIZED
    )
    assert mx.get_peak_memory() - before < 10e6

"""Weights, adapters, saved prompts, drafts with every type that takes them in mlx-lm.

On three ranks, which is as good as any number for what is tested here.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from equal import Tokens
from every_type import (
    LONG,
    PROMPT,
    REPRESENTATIVES,
    RUNNABLE,
    check_logits,
    for_types,
    split,
)
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, load_tokenizer
from reference import as_numpy, on_rank_0
from saved_types import saved
from tiny import save_tokenizer

from mlxtp import Communicator, stream_generate
from mlxtp.generation.prompt_cache import SavedPrompt
from mlxtp.generation.sampling import seeded
from mlxtp.loading import load_model as load_split
from mlxtp.partition.shares import Share

use_plain_operations()
pytestmark = pytest.mark.ranks(3)

STEPS, SEED = 6, 7

QUICK = ["llama", "deepseek_v3", "gpt_oss", "mamba2", "qwen3_next"]


EVERY_TYPE = for_types(RUNNABLE, QUICK)

# Of each kind of attention whose query heads may be shared out one by one, with gates,
# sinks, windows, shared keys, joint sums and layers that differ.
ONE_BY_ONE = [
    *("llama", "gpt_oss", "qwen3_next", "gemma3n", "mimo_v2_flash", "cohere2"),
    *("baichuan_m1", "bailing_moe", "cohere", "exaone", "gear", "gemma2", "internlm2"),
    *("iquestloopcoder", "phi3", "minimax_m3_vl", "muse_spark", "nanochat", "plamo2"),
]


@lru_cache(maxsize=1)
def whole(folder: Path) -> nn.Module:
    """The model in one process, as mlx-lm loads it; no test changes it."""
    return load_model(folder)[0]


@pytest.fixture(scope="session")
def llama(comm: Communicator) -> nn.Module:
    """Llama on all ranks, to draft and be drafted for."""
    return load_split(saved("llama", comm), comm)[0]


@pytest.fixture(scope="session")
def tokenizer(comm: Communicator, shared_path: Path) -> TokenizerWrapper:
    """A tokenizer whose texts never end."""
    folder = shared_path / "tokenizer-of-types"
    on_rank_0(comm, lambda: save_tokenizer(folder))
    result = load_tokenizer(folder)
    result.eos_token_ids = set()
    return result


@pytest.mark.parametrize("kind", ["lora", "dora"])
@EVERY_TYPE
def test_adapter(
    model_type: str, kind: str, comm: Communicator, shared_path: Path
) -> None:
    if (why := zoo.ADAPTER_FAILS.get((model_type, kind))) is not None:
        pytest.skip(f"not in mlx-lm either: {why}")
    check_adapter(model_type, kind, comm, shared_path)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_where_ranks_share_groups(
    kind: str, comm: Communicator, shared_path: Path
) -> None:
    """The heads of a rank, of 16 columns each, end inside groups of 64."""
    check_adapter("llama", kind, comm, shared_path, bits=4)


def check_adapter(
    model_type: str,
    kind: str,
    comm: Communicator,
    shared_path: Path,
    bits: int | None = None,
) -> None:
    adapter = shared_path / f"{model_type}-{kind}-{bits}"

    folder = saved(model_type, comm, bits, group_size=64)

    def make() -> Any:
        model, _ = load_model(folder)
        save_adapter(model, adapter, kind)
        model, _ = load_model(folder)
        plain = as_numpy(model(mx.array([PROMPT]), cache=make_prompt_cache(model)))
        load_adapters(model, str(adapter))
        model.eval()
        logits = model(mx.array([PROMPT]), cache=make_prompt_cache(model))
        return plain, as_numpy(logits)

    plain, expected = on_rank_0(comm, make)
    assert (plain != expected).any()
    model, _ = load_split(folder, comm, adapter_path=adapter)
    logits = model(mx.array([PROMPT]), cache=make_prompt_cache(model))
    check_logits(model_type, [logits], [expected])


def save_adapter(model: nn.Module, folder: Path, kind: str) -> None:
    """Adapt all linear layers of the model's layers, experts by LoRA alone."""
    folder.mkdir(exist_ok=True)
    keys = {
        name
        for layer in model.layers
        for name, module in layer.named_modules()
        # but those that are asked for their weight, or split their output
        if (
            (
                isinstance(module, nn.Linear | nn.QuantizedLinear)
                and not hasattr(module, "indices")
            )
            and not name.endswith(("res_proj", "coefs"))
        )
        or (kind == "lora" and hasattr(module, "num_experts") and "weight" in module)
    }
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": sorted(keys)}
    config = {
        "fine_tune_type": kind,
        "num_layers": len(model.layers),
        "lora_parameters": parameters,
    }
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=kind == "dora")
    weights = {
        name: 0.1 * mx.random.normal(p.shape, key=mx.random.key(len(name)))
        + (1 if name.endswith(".m") else 0)
        for name, p in tree_flatten(model.parameters())
        if name.split(".lora_")[0] != name or name.endswith(".m")
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_saved_latents_where_a_rank_has_one_head(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents' one head is not taken for the rank's."""
    few = {"num_attention_heads": 3, "num_key_value_heads": 3}
    monkeypatch.setitem(zoo.VARIANTS, "three-heads", ("deepseek_v3", few))
    model, _ = load_split(saved("three-heads", comm), comm)
    check_saved_prompt("three-heads", model, comm, shared_path)


@EVERY_TYPE
def test_uneven_shares(model_type: str, comm: Communicator) -> None:
    """A rank that gets three times the work of another, of floats or of 4 bits.

    Every other type has 4 bits here, to save time. All have them, in equal shares, in
    `test_quantized` (`families/test_every_type.py`).
    """
    packed = RUNNABLE.index(model_type) % 2 and model_type not in zoo.QUANTIZED_FAILS
    folder = saved(model_type, comm, 4 if packed else None)
    expected = on_rank_0(comm, lambda: as_numpy(whole(folder)(mx.array([PROMPT]))))
    model, _ = load_split(folder, comm, shares=[3, 1, 2])
    check_logits(model_type, [model(mx.array([PROMPT]))], [expected])


@for_types(ONE_BY_ONE, ["llama", "gpt_oss", "qwen3_next"])
def test_query_heads_one_by_one(model_type: str, comm: Communicator) -> None:
    """Ranks share KV heads, and zeros make up what attention takes for a rectangle."""
    packed = RUNNABLE.index(model_type) % 2 and model_type not in zoo.QUANTIZED_FAILS
    folder = saved(model_type, comm, 4 if packed else None)
    shares = [Share(3, 1, 1, True), Share(1, 2, 1, True), Share(2, 1, 2, True)]

    def read(model: nn.Module) -> list[mx.array]:
        """The logits of a prompt, and of a token behind it."""
        cache = make_prompt_cache(model)
        pieces = mx.array([PROMPT[:-1]]), mx.array([PROMPT[-1:]])
        return [model(piece, cache=cache) for piece in pieces]

    expected = on_rank_0(comm, lambda: [as_numpy(x) for x in read(whole(folder))])
    model, _ = load_split(folder, comm, shares=shares)
    blocks = model.slice_table.blocks
    assert any(any(part.zeros) for block in blocks for part in block.parts)
    check_logits(model_type, read(model), expected)


@EVERY_TYPE
def test_saved_prompt(model_type: str, comm: Communicator, shared_path: Path) -> None:
    """A cache that one process saved is continued by all ranks."""
    check_saved_prompt(model_type, split(model_type, comm), comm, shared_path)


def check_saved_prompt(
    model_type: str, model: nn.Module, comm: Communicator, shared_path: Path
) -> None:
    folder = saved(model_type, comm)
    file = shared_path / f"{model_type}.safetensors"

    def continued(model: nn.Module, caches: list[Any]) -> Tokens:
        return Tokens.of(
            generate_step(
                mx.array(PROMPT[:3]), model, prompt_cache=caches, max_tokens=STEPS
            )
        )

    def save_and_continue() -> Any:
        caches = make_prompt_cache(whole(folder))
        mx.eval(whole(folder)(mx.array([LONG]), cache=caches))
        metadata = {"model": model_type, "tokenizer_config": "{}"}
        try:
            save_prompt_cache(str(file), caches, metadata)
            SavedPrompt.of_file(file)
        except Exception as error:
            return repr(error)
        return continued(whole(folder), caches)

    expected = on_rank_0(comm, save_and_continue)
    if isinstance(expected, str):
        assert model_type in zoo.UNSAVED, expected
        pytest.skip(f"not in mlx-lm either: {zoo.UNSAVED[model_type]}")
    caches = SavedPrompt.of_file(file).shard(model, comm)
    assert continued(model, caches) == expected


@for_types(REPRESENTATIVES, QUICK)
def test_draft_model(model_type: str, llama: nn.Module, comm: Communicator) -> None:
    """In mlx-lm's own loop it drafts, and is drafted for.

    What is drafted wrong is taken back. All types do that in ours, below.
    """

    def both_ways(model: nn.Module, other: nn.Module) -> Any:
        try:
            return [drafted(model, other), drafted(other, model)]
        except (ValueError, NotImplementedError) as error:
            return str(error)

    def drafted(model: nn.Module, draft: nn.Module) -> tuple[Tokens, list[bool]]:
        steps = list(
            speculative_generate_step(
                mx.array(PROMPT[:3]), model, draft, max_tokens=STEPS
            )
        )
        return Tokens.of(steps), [from_draft for _, _, from_draft in steps]

    folders = [saved(name, comm) for name in (model_type, "llama")]
    expected = on_rank_0(
        comm, lambda: both_ways(whole(folders[0]), load_model(folders[1])[0])
    )
    assert both_ways(split(model_type, comm), llama) == expected
    if isinstance(expected, str):
        pytest.skip(f"not in mlx-lm either: {expected}")


class Scripted:
    """Drafts that are right up to a token that changes from round to round."""

    RIGHT = (2, 0, 9, 1, 9, 9, 0)

    def __init__(self, prompt: list[int], text: list[int]) -> None:
        self.tokens, self.rounds = [*prompt, *text], 0

    def begin(self, *_: Any) -> "Scripted":
        return self

    def propose(self, tokens: list[int], count: int) -> list[int]:
        right = self.RIGHT[self.rounds % len(self.RIGHT)]
        self.rounds += 1
        drafted = self.tokens[len(tokens) : len(tokens) + count]
        return [
            token if place < right else (token + 1) % zoo.VOCABULARY
            for place, token in enumerate(drafted)
        ]


@EVERY_TYPE
def test_drafts_change_no_tokens(
    model_type: str, comm: Communicator, tokenizer: TokenizerWrapper
) -> None:
    """Greedy from a short prompt on, whose windows fill, and drawn behind a long one.

    Whatever was drafted, and whatever the caches are that are taken back.
    """
    folder, model = saved(model_type, comm), split(model_type, comm)
    greedy: dict[str, Any] = {"max_tokens": 2 * STEPS}
    drawn = {**greedy, "sampler": make_sampler(1.0, top_p=0.9)}
    for prompt, options in ((PROMPT[:3], greedy), (LONG, drawn)):
        by_position = seeded(options, SEED, len(prompt))
        steps = on_rank_0(
            comm,
            lambda p=prompt, o=by_position: Tokens.of(
                generate_step(mx.array(p), whole(folder), **o)
            ),
        )
        stream = stream_generate(
            *(model, tokenizer, prompt),
            draft_model=Scripted(prompt, steps),
            num_draft_tokens=3,
            seed=SEED,
            **options,
        )
        said = list(stream)
        assert Tokens.of((x.token, x.logprobs) for x in said) == steps
        assert sum(x.from_draft for x in said) >= STEPS


@EVERY_TYPE
def test_layers_that_nobody_reads(
    model_type: str, comm: Communicator, tokenizer: TokenizerWrapper
) -> None:
    """While a prompt is read, the layers behind the last cache are left out."""
    options: dict[str, Any] = {"max_tokens": STEPS, "prefill_step_size": 37}
    folder = saved(model_type, comm)
    expected = on_rank_0(
        comm,
        lambda: Tokens.of(generate_step(mx.array(LONG), whole(folder), **options)),
    )
    model = split(model_type, comm)
    stream = stream_generate(model, tokenizer, LONG, **options)
    assert Tokens.of((said.token, said.logprobs) for said in stream) == expected

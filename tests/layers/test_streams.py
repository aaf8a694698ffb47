"""Streams of one model do not touch each other: state belongs to a call."""

from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from every_type import PROMPT
from metal_kernels import use_plain_operations
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from saved_types import saved
from tiny import Tiny, made_by_rank_0

from mlxtp import Communicator, stream_generate
from mlxtp.layers.sums import outputs_unread
from mlxtp.loading import load_model

use_plain_operations()

STEPS = 6
OTHER = [*PROMPT[::-1], 7, 9]

# Plain; sums made in one; queries and keys normed together; a projection for all steps;
# a sum inside of a block. A tied head and embeddings that are added.
TYPES = ["llama", "cohere", "gpt2", "olmo2", "mamba", "kimi_k3"]


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=STEPS)
    return [token for token, _ in steps]


def left_on(model: nn.Module) -> dict[str, tuple[type, list[str], dict[str, Any]]]:
    """Classes, children and attributes of all modules."""
    return {
        path: (type(module), list(module), dict(vars(module)))
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_one_reads_while_another_decodes(
    model_type: str, comm: Communicator, shared_path: Path
) -> None:
    """A stream decodes a token between the pieces of the other's prompt."""
    model, _ = load_model(saved(model_type, comm), comm)
    tokenizer = load_tokenizer(made_by_rank_0(Tiny(), shared_path / "tokenizer", comm))
    tokenizer.eos_token_ids = set()
    expected = greedy(model, PROMPT), greedy(model, OTHER)
    before = left_on(model)
    first = stream_generate(model, tokenizer, PROMPT, max_tokens=STEPS)
    tokens: tuple[list[int], list[int]] = ([next(first).token], [])

    def decode(processed: int, total: int) -> None:
        if 0 < processed < total:
            tokens[0].append(next(first).token)
            assert model(mx.array([PROMPT])).any().item()  # nor others' calls

    second = stream_generate(
        model,
        tokenizer,
        OTHER,
        max_tokens=STEPS,
        prefill_step_size=4,
        prompt_progress_callback=decode,
    )
    tokens[1].append(next(second).token)
    assert len(tokens[0]) > 2
    for one, two in zip(first, second, strict=False):
        tokens[0].append(one.token)
        tokens[1].append(two.token)
    tokens[1].extend(response.token for response in second)
    assert tokens[1] == expected[1]
    assert tokens[0] == expected[0][: len(tokens[0])]
    assert left_on(model) == before


@pytest.mark.parametrize("model_type", TYPES)
def test_threads_have_calls_of_their_own(
    model_type: str, comm: Communicator, shared_path: Path
) -> None:
    model, _ = load_model(saved(model_type, comm), comm)
    whole = model(mx.array([PROMPT]), cache=make_prompt_cache(model))
    mx.eval(whole)
    logits: list[Any] = []

    def other() -> None:
        y = model(mx.array([PROMPT]), cache=make_prompt_cache(model))
        logits.append(y.tolist())

    with outputs_unread():
        thread = Thread(target=other)
        thread.start()
        thread.join()
        unread = model(mx.array([PROMPT]), cache=make_prompt_cache(model))
    assert logits == [whole.tolist()]
    assert unread.shape == whole.shape and not (unread == whole).all().item()


class Noted:
    """A communicator that writes down where its collectives stand."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        self.paths.append(at)
        return self.comm.allreduce(x, at)

    def allgather(self, x: mx.array, sizes: list[int], at: str = "") -> mx.array:
        self.paths.append(at)
        return self.comm.allgather(x, sizes, at)


@pytest.mark.parametrize(
    ("model_type", "silent"),
    [
        ("llama", ["lm_head", "model.layers.1.mlp.down_proj", "self_attn.o_proj"]),
        ("qwen3_moe", ["model.embed_tokens", "model.layers.1.mlp", "self_attn.o_proj"]),
        ("cohere", ["model.embed_tokens", "model.layers.1.mlp.down_proj"]),
        ("nanbeige", ["lm_head"]),  # it calls its layers again
        ("rwkv7", ["lm_head", "ffn.value"]),  # a cache stands behind the attention
    ],
)
def test_silent_is_what_no_cache_depends_on(
    model_type: str, silent: list[str], comm: Communicator, shared_path: Path
) -> None:
    noted = Noted(comm)
    folder = saved(model_type, comm)
    model, _ = load_model(folder, noted)

    def called() -> list[str]:
        noted.paths.clear()
        mx.eval(model(mx.array([PROMPT]), cache=make_prompt_cache(model)))
        return sorted(noted.paths)

    whole = called()
    with outputs_unread():
        for path in called():
            whole.remove(path)
    assert len(whole) == len(silent)
    for path, end in zip(whole, silent, strict=True):
        assert path.endswith(end)


def test_a_context_lasts_as_long_as_a_call(
    comm: Communicator, shared_path: Path
) -> None:
    """What is called for its caches alone leaves caches as whole as another's."""
    folder = saved("llama", comm)
    model, _ = load_model(folder, comm)
    caches = make_prompt_cache(model), make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=caches[0])
    with outputs_unread():
        model(mx.array([PROMPT]), cache=caches[1])
    kept = [mx.concatenate(one.state[:2]).tolist() for one in caches[0]]
    assert [mx.concatenate(one.state[:2]).tolist() for one in caches[1]] == kept
    token = mx.array([[5]])
    assert (model(token, cache=caches[0]) == model(token, cache=caches[1])).all().item()

"""Requests that join, leave and share: each gets the tokens that it gets alone."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from driven import GREEDY, Driven
from equal import Tokens
from every_type import LONG, PROMPT, REPRESENTATIVES, RUNNABLE, for_types, split
from foretold import Foretold
from kept import kept
from metal_kernels import use_plain_operations
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model, load_tokenizer
from reference import on_rank_0
from saved_types import saved
from tiny import Tiny

import mlxtp
from mlxtp import Communicator
from mlxtp.generation.batching import can_draft_in_batches
from mlxtp.generation.draft_lengths import DraftLengths
from mlxtp.generation.drawing import Score
from mlxtp.generation.engine import Engine
from mlxtp.generation.step import Admission, GenerationRequest, Step
from mlxtp.stories import PATH as STORIES

use_plain_operations()

# Longer than the windows of `zoo`, 8 tokens, several times; a little longer; shorter;
# and one token alone. They join and end one by one.
PROMPTS = {"a": LONG[:61], "b": LONG[61:84], "c": PROMPT[:5], "d": PROMPT[5:6]}
STEPS = {"a": 6, "b": 9, "c": 4, "d": 6}
# What a second turn adds to the first one of "a".
MORE = [7, 3, 11, 2]

QUICK = [*REPRESENTATIVES, "gemma2", "gpt_bigcode", "llama4"]


# What differs between worlds is how matrices are cut (families/test_every_type).
@for_types(RUNNABLE, QUICK, worlds=[3])
def test_equals_one_process(model_type: str, comm: Communicator) -> None:
    folder = saved(model_type, comm)

    def alone() -> dict[str, Tokens]:
        model, _ = load_model(folder)

        def tokens(prompt: list[int], count: int) -> Tokens:
            steps = generate_step(mx.array(prompt), model, max_tokens=count)
            return Tokens.of(steps)

        each = {name: tokens(PROMPTS[name], STEPS[name]) for name in PROMPTS}
        each["again"] = tokens([*PROMPTS["a"], *each["a"], *MORE], 4)
        return each

    expected = kept(comm, f"{model_type}-engine", lambda _: alone())
    driven = Driven(split(model_type, comm), comm)
    for name, prompt in PROMPTS.items():
        driven.submit(name, prompt, max_tokens=STEPS[name], boundaries=[len(prompt)])
        driven.pass_()
        driven.pass_()
    got = driven.run()
    assert {name: expected[name] for name in PROMPTS} == dict(got)
    rows = max(len(step.join) for step in driven.steps)
    assert rows >= 1
    turn = [*PROMPTS["a"], *expected["a"]]
    driven.submit("again", [*turn, *MORE], max_tokens=4)
    driven.run()
    assert expected["again"] == driven.tokens["again"]
    if comm.rank == 0 and got["a"] == list(expected["a"]):
        # Behind the last token of the first turn, or where it can be taken back to.
        assert driven.scheduler.found_tokens >= len(turn)
    drafted = driven_with_drafts(model_type, expected, comm)
    assert {name: expected[name] for name in PROMPTS} == dict(drafted.run())
    # Its caches are those of all tokens but what was rejected.
    drafted.submit("again", [*turn, *MORE], max_tokens=4)
    drafted.run()
    assert expected["again"] == drafted.tokens["again"]


def driven_with_drafts(
    model_type: str, expected: dict[str, Tokens], comm: Communicator
) -> Driven:
    """Hand in the same requests, of which every fourth token is drafted wrongly."""
    model = split(model_type, comm)
    texts = [[*prompt, *expected[name]] for name, prompt in PROMPTS.items()]
    texts.append([*texts[0], *MORE, *expected["again"]])
    result = Driven(
        model,
        comm,
        drafts=Foretold(texts),
        draft_lengths=DraftLengths(3, in_batches=can_draft_in_batches(model)),
    )
    for name, prompt in PROMPTS.items():
        steps, boundaries = STEPS[name], [len(prompt)]
        result.submit(name, prompt, max_tokens=steps, boundaries=boundaries)
        result.pass_()
        result.pass_()
    return result


@pytest.fixture(scope="module")
def model(comm: Communicator) -> nn.Module:
    """The one that ships, in float32."""
    model, _ = mlxtp.load(STORIES, comm)
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="module")
def prompt(comm: Communicator) -> list[int]:
    """As many tokens as fit twice into the context of the model."""
    tokenizer = load_tokenizer(STORIES)
    text = "Once upon a time a girl named Mia lived by the sea with her dog. " * 20
    return tokenizer.encode(text)[:220]


EVERY_TOKEN = 1 << 20  # as a `top_k`: more than there are

SAMPLED = {
    "greedy": GREEDY,
    "warm": replace(GREEDY, temperature=0.9, seed=3),
    "top": replace(GREEDY, temperature=1.1, seed=4, top_p=0.8, top_k=20, min_p=0.01),
    "other seed": replace(GREEDY, temperature=0.9, seed=5, top_k=EVERY_TOKEN),
    "scores": replace(GREEDY, logprobs=3),
    "penalties": replace(
        GREEDY,
        temperature=0.7,
        seed=6,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.4,
        logit_bias={7: 2.5, 11: -100.0},
    ),
}


def test_settings_hold_in_a_batch(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """What is drawn depends on a request alone, and is what `stream_generate` draws."""
    together, alone = Driven(model, comm), Driven(model, comm)
    for number, (name, settings) in enumerate(SAMPLED.items()):
        together.submit(name, prompt[number : 40 + 9 * number], settings, max_tokens=12)
        together.pass_()
        alone.submit(name, prompt[number : 40 + 9 * number], settings, max_tokens=12)
        alone.run()
    assert together.run() == alone.tokens
    assert max(map(len, together.tokens.values())) == 12
    assert together.tokens["warm"] != together.tokens["other seed"]
    for number, (name, settings) in enumerate(SAMPLED.items()):
        if name == "penalties":
            continue
        stream = mlxtp.stream_generate(
            model,
            load_tokenizer(STORIES),
            prompt[number : 40 + 9 * number],
            max_tokens=12,
            seed=settings.seed,
            sampler=make_sampler(
                settings.temperature,
                settings.top_p,
                settings.min_p,
                top_k=settings.top_k % EVERY_TOKEN,
            ),
        )
        streamed = [response.token for response in stream]
        assert streamed == alone.tokens[name][: len(streamed)]


def test_penalties_and_biases(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    driven = Driven(model, comm)
    driven.submit("plain", prompt[:20], max_tokens=16)
    plain = driven.run()["plain"]
    driven.submit("without", prompt[:20], max_tokens=1, logit_bias={plain[0]: -100.0})
    driven.submit("only", prompt[:20], max_tokens=5, logit_bias={9: 100.0})
    # A bias for one token, which a penalty outweighs once it has come.
    driven.submit(
        "once", prompt[:20], max_tokens=5, logit_bias={9: 100.0}, presence_penalty=200.0
    )
    # More than the penalty for two, less than for three: the prompt does not count.
    driven.submit(
        "twice",
        [9, *prompt[:20]],
        max_tokens=5,
        logit_bias={9: 100.0},
        frequency_penalty=45.0,
    )
    tokens = driven.run()
    assert tokens["without"] != plain[:1]
    assert tokens["only"] == [9] * 5
    assert tokens["once"].count(9) == 1
    assert tokens["twice"].count(9) == 2


def test_scores_are_the_model_s(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """Before biases and temperature; those of a prompt as well."""
    driven = Driven(model, comm, part=16)
    tokens = prompt[:50]
    driven.submit("scores", tokens, max_tokens=4, logprobs=2, logit_bias={5: 50.0})
    driven.submit("prompt", tokens, max_tokens=0, prompt_logprobs=3)
    driven.run()
    # Of these nothing is read: one token alone, and a prompt that was cached.
    driven.submit("one", tokens[:1], max_tokens=0, prompt_logprobs=3)
    driven.submit("cached", tokens, max_tokens=0)
    driven.run()
    assert driven.scores["one"] == [] and driven.scores["cached"] is None
    assert driven.tokens == {"scores": [5] * 4, "prompt": [], "one": [], "cached": []}
    logits = model(mx.array([[*tokens, 5, 5, 5]]))[0]
    logprobs = np.array(logits - mx.logsumexp(logits, -1, keepdims=True))
    for at, drawn in enumerate(driven.drawn["scores"]):
        row = logprobs[len(tokens) - 1 + at]
        assert drawn.score is not None
        check_score(drawn.score, row, drawn.token, 2)
    of_prompt = driven.scores["prompt"]
    assert of_prompt is not None and len(of_prompt) == len(tokens) - 1
    for at, score in enumerate(of_prompt):
        check_score(score, logprobs[at], tokens[at + 1], 3)


def test_a_prompt_of_which_nothing_is_left_to_read(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """It has one token, or the prefix cache has all others: it ends nevertheless."""
    driven = Driven(model, comm)
    driven.submit("kept", prompt[:50], max_tokens=1)
    driven.run()
    driven.submit("again", prompt[:50], max_tokens=0)
    driven.submit("one", prompt[:1], max_tokens=0, prompt_logprobs=3)
    for _ in range(4):
        driven.pass_()
    assert driven.scores == {"kept": None, "again": None, "one": []}
    assert not driven.pass_()


def check_score(score: Score, row: np.ndarray, token: int, n: int) -> None:
    """Compare a score with log-probabilities (V,)."""
    # A prompt that is read in parts, or in a batch, is rounded differently.
    assert score.logprob == pytest.approx(row[token], abs=1e-3)
    best = np.sort(row)[::-1][:n]
    assert [x for _, x in score.top] == pytest.approx(best, abs=1e-3)
    assert all(row[t] == pytest.approx(x, abs=1e-3) for t, x in score.top)


def test_when_memory_gets_short(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """The youngest is set back and goes on later; nothing else changes."""
    prompts = {name: prompt[at:][:60] for at, name in enumerate("abcd")}
    wide = Driven(model, comm)
    for name, part in prompts.items():
        wide.submit(name, part, max_tokens=60)
    wide.run()
    # There is room for four rows of 80 tokens, and they will have 120.
    limit = max(rank.used_bytes([80] * 4, [], 0, 37) for rank in wide.capacity.ranks)
    narrow = Driven(model, comm, limit_bytes=limit)
    narrow.run_short(wide, prompts, max_tokens=60)


def test_a_prompt_is_read_beside_others(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """And those that have it in common read it once."""
    driven = Driven(model, comm, part=64)
    driven.submit("old", prompt[:10], max_tokens=60)
    for _ in range(5):
        driven.pass_()
    before = len(driven.tokens["old"])
    for name in ("first", "second", "third"):
        driven.submit(name, prompt, max_tokens=5, temperature=0.9, seed=ord(name[0]))
    driven.run()
    reading = [step for step in driven.steps if step.read]
    assert len(driven.tokens["old"]) == 60 > before
    assert len(set(map(tuple, driven.tokens.values()))) == 4
    read = sum(count for step in reading for _, count in step.read)
    # Each prompt but its last token; of two prompts one token more, or none.
    assert read <= 9 + len(prompt) - 1 + 2
    alone = Driven(model, comm)
    for name in ("first", "second", "third"):
        alone.submit(name, prompt, max_tokens=5, temperature=0.9, seed=ord(name[0]))
        alone.run()
        assert alone.tokens[name] == driven.tokens[name]


@pytest.mark.parametrize("passes", [0, 1, 2, 4, 7])
def test_cancelled_at_any_stage(
    passes: int, model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    driven = Driven(model, comm, part=32)
    driven.submit("stays", prompt[3:50], max_tokens=12)
    driven.submit("goes", prompt[:100], max_tokens=50)
    for _ in range(passes):
        driven.pass_()
    driven.scheduler.end("goes")
    driven.pass_()
    count = len(driven.tokens["goes"])
    tokens = driven.run()["stays"]
    assert len(driven.tokens["goes"]) == count  # one pass later it is gone
    alone = Driven(model, comm)
    alone.submit("stays", prompt[3:50], max_tokens=12)
    assert alone.run()["stays"] == tokens
    assert not driven.engine._readers and not driven.engine._of


def test_interrupted_and_gone_on(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """A request that is handed in again with its tokens goes on with the same ones."""
    settings = SAMPLED["penalties"]
    whole = Driven(model, comm)
    whole.submit("x", prompt[:30], settings, max_tokens=20)
    expected = whole.run()["x"]
    rest = Driven(model, comm)
    request = GenerationRequest(
        "x", (*prompt[:30], *expected[:8]), 30, replace(settings, max_tokens=20)
    )
    rest.take(request)
    assert rest.run()["x"] == expected[8:]


def test_set_back_while_nothing_else_decodes(
    model: nn.Module, prompt: list[int], comm: Communicator
) -> None:
    """What was drawn last is drawn again, and not taken for what is known."""
    tokens: list[int] = []

    def passes(engine: Engine, count: int) -> None:
        """Read the prompt and all tokens so far, and decode for so many passes."""
        request = GenerationRequest("x", (*prompt[:9], *tokens), 9, GREEDY)
        engine.run(Step(admit=(Admission(request),)))
        engine.run(Step(read=(("x", len(request.tokens) - 1),)))
        for step in (Step(join=("x",)), *[Step()] * count):
            drawn = engine.run(step).drawn
            tokens.extend(x.token for x in drawn.get("x", ()))
        engine.run(Step(drop=("x",)))

    driven = Driven(model, comm)
    mx.eval(model(mx.array([prompt[:9]])))
    before = mx.get_active_memory()
    passes(driven.engine, 12)
    expected, tokens = tokens, []
    for _ in range(4):
        passes(driven.engine, 3)
    assert tokens == expected
    # No caches are left, once the last pass is made.
    mx.synchronize()
    caches = driven.capacity.bytes_of(1)[comm.rank]
    assert mx.get_active_memory() < before + caches / 2


def test_quantized_caches(shared_path: Path, comm: Communicator) -> None:
    """They stand in no batch; tokens are `stream_generate`'s."""
    folder = shared_path / "wide"
    on_rank_0(comm, lambda: Tiny({"head_dim": 32}).save(folder))
    model, tokenizer = mlxtp.load(folder, comm)
    driven = Driven(model, comm, concurrency=1, kv_bits=8, kv_group_size=32)
    prompts = {"a": LONG[:40], "b": LONG[:90]}
    for name, prompt in prompts.items():
        driven.submit(name, prompt, max_tokens=8)
    driven.run()
    for name, prompt in prompts.items():
        stream = mlxtp.stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=8,
            prefill_step_size=37,
            kv_bits=8,
            kv_group_size=32,
            quantized_kv_start=0,
        )
        streamed = [response.token for response in stream]
        assert streamed == driven.tokens[name][: len(streamed)]

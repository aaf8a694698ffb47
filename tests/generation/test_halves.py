"""Prompts in two halves: caches to the bit, equal tokens, and whether it pays."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from driven import GREEDY, Driven
from eager import over_eager
from equal import Tokens
from every_type import LONG, REPRESENTATIVES, RUNNABLE, for_types, split
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from pyramid import sweep
from saved_types import saved

import mlxtp
from mlxtp import Communicator
from mlxtp.generation import halves
from mlxtp.generation.halves import Costs, Halves, Line, measure, read_in_halves
from mlxtp.layers.sums import outputs_unread
from mlxtp.loading import load_model
from mlxtp.stories import PATH as STORIES

use_plain_operations()

# Halves of anything pay.
ALWAYS = Costs(Line(0, 1), Line(0, 1), Line(0, 2), 100)

# Windows and blocks of `zoo` end within either half, and are passed in both.
PROMPT, REST, STEPS = LONG[:75], LONG[75:86], 4


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets all parts of a model's prompts be read in halves, down to two tokens."""
    monkeypatch.setattr(halves, "LEAST_TOKENS", 2)

    def force(model: nn.Module) -> nn.Module:
        monkeypatch.setattr(model, "pass_costs", ALWAYS, raising=False)
        return model

    return force


def arrays(caches: list[Any]) -> list[mx.array]:
    states = tree_flatten([cache.state for cache in caches])
    return [array for _, array in states if isinstance(array, mx.array)]


def one_after_the_other(
    model: nn.Module, tokens: mx.array, cache: list[Any]
) -> list[mx.array]:
    """The halves as mlx-lm reads them in two steps."""
    half = (tokens.shape[1] + 1) // 2
    logits = []
    for part in (tokens[:, :half], tokens[:, half:]):
        logits.append(model(part, cache=cache))
        mx.eval(logits, arrays(cache))
    return logits


@pytest.mark.ranks(3)
@for_types(RUNNABLE, REPRESENTATIVES)
def test_every_type(model_type: str, comm: Communicator) -> None:
    """Caches and logits are those of two calls, to the bit; tokens those of one."""
    model = split(model_type, comm)
    parts, turns, whole = (make_prompt_cache(model) for _ in range(3))
    for tokens in (mx.array([PROMPT]), mx.array([REST])):  # the second in filled caches
        expected = one_after_the_other(model, tokens, parts)
        got = read_in_halves(model, model, tokens, cache=turns)
        assert mx.array_equal(got, mx.concatenate(expected, axis=1), equal_nan=True)
        for a, b in zip(arrays(turns), arrays(parts), strict=True):
            assert mx.array_equal(a, b, equal_nan=True)
        model(tokens, cache=whole)
        mx.eval(arrays(whole))
    made = [
        Tokens.of(
            generate_step(mx.array([7]), model, max_tokens=STEPS, prompt_cache=caches)
        )
        for caches in (turns, whole)
    ]
    if model_type not in zoo.BFLOAT16:
        assert made[0] == made[1]


class Followed:
    """A communicator that notes what its collectives are given, and can change one."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.inputs: list[mx.array] = []
        self.changed = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def _sent(self, x: mx.array) -> mx.array:
        self.inputs.append(x)
        return x + 1 if len(self.inputs) - 1 == self.changed else x

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        return self._sent(x)

    def allgather(self, x: mx.array, sizes: list[int], at: str = "") -> mx.array:
        return self._sent(x)


@pytest.mark.once
@pytest.mark.parametrize("model_type", sweep(RUNNABLE, REPRESENTATIVES))
def test_the_first_half_is_ahead(model_type: str, comm: Communicator) -> None:
    """What the second sends needs nothing that the first sends later: so it is hidden.

    One collective of the first is changed: the second's are as they were, up to that.
    """
    followed = Followed(Communicator())
    model, _ = load_model(saved(model_type, comm), followed)

    def read(changed: int) -> tuple[list[mx.array], list[mx.array]]:
        caches = make_prompt_cache(model)
        both = []
        for part, which in ((LONG[:20], changed), (LONG[20:40], -1)):
            followed.inputs, followed.changed = [], which
            with outputs_unread():
                model(mx.array([part]), cache=caches)
            both.append(followed.inputs)
        return both[0], both[1]

    first, second = read(-1)
    assert len(first) == len(second)
    seen = False
    for changed in range(len(first)):
        _, now = read(changed)
        same = [
            mx.array_equal(a, b, equal_nan=True).item()
            for a, b in zip(now, second, strict=True)
        ]
        assert all(same[:changed]), f"sum {changed} of the first comes too late"
        seen |= not all(same)
    assert seen  # what the first sends does show in the second


@pytest.mark.ranks(3)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba2"])
def test_streams_and_batches(
    model_type: str, comm: Communicator, always: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the server too, whose requests come and go, with scores of their prompts."""
    model = split(model_type, comm)
    tokenizer = load_tokenizer(STORIES)
    tokenizer.eos_token_ids = set()
    prompts = [PROMPT, REST]

    def everything() -> list[Any]:
        driven = Driven(model, comm, part=64)
        for name, prompt in zip("ab", prompts, strict=True):
            driven.submit(name, prompt, GREEDY, max_tokens=STEPS, prompt_logprobs=1)
            driven.pass_()
        engine = driven.run()
        scores = [[s.logprob for s in driven.scores[name] or []] for name in "ab"]
        stream = mlxtp.stream_generate(
            model, tokenizer, PROMPT, max_tokens=STEPS, prefill_step_size=64
        )
        batch = mlxtp.batch_generate(
            model, tokenizer, prompts, max_tokens=STEPS, return_token_ids=True
        )
        streamed = [response.token for response in stream]
        return [dict(engine), scores, streamed, batch.token_ids]

    plain = everything()
    always(model)
    taken: list[int] = []
    real = comm.take_turns
    monkeypatch.setattr(comm, "take_turns", lambda *x: taken.append(len(x)) or real(*x))
    in_halves = everything()
    assert in_halves[0] == plain[0] and in_halves[2:] == plain[2:]
    assert len(taken) >= 6
    for a, b in zip(in_halves[1], plain[1], strict=True):
        assert mx.allclose(mx.array(a), mx.array(b), atol=1e-3)


@pytest.mark.once
def test_whether_it_pays() -> None:
    # A part of 2048 tokens over cables: 30 s of products, 8 s of sums.
    sums, two = Line(0.08, 0.0039), Line(0.08, 0.0078)
    cables = Costs(Line(0.1, 0.0146), sums, two, 251)
    assert cables.pay(2048)
    assert cables.halves(2048) == pytest.approx(30.2, rel=0.02)
    # Links that only wait hide what is computed, if that is something.
    waits = Line(0.1, 0)
    assert Costs(Line(0, 2e-4), waits, waits, 20).pay(512)
    assert not Costs(Line(0, 1e-5), waits, waits, 20).pay(512)
    # Two sums take as long as one after the other, and longer than what is computed.
    assert not Costs(Line(0, 1e-4), waits, Line(0.2, 0), 20).pay(512)
    # Nothing to speak of travels.
    assert not Costs(Line(0, 0.01), Line(0, 1e-4), Line(0, 2e-4), 20).pay(512)
    # Weights that take longer to read than tokens to compute: read twice.
    assert not Costs(Line(1, 1e-3), Line(0, 1e-3), Line(0, 2e-3), 20).pay(128)


@pytest.mark.once
def test_a_line_through_two_measures() -> None:
    line = Line.through((16, 64), (0.5, 0.98))
    assert (line.base, line.token) == pytest.approx((0.34, 0.01))
    assert line.at(32) == pytest.approx(0.66)
    assert Line.through((16, 64), (0.5, 0.4)) == Line(0.5, 0.0)
    assert Line.through((16, 64), (0.1, 0.9)).base == 0.0


@pytest.fixture
def model(comm: Communicator) -> Iterator[nn.Module]:
    yield load_model(saved("llama", comm), comm)[0]


def test_nothing_is_measured_on_one_host(model: nn.Module, comm: Communicator) -> None:
    comm.traffic.reset()
    assert measure(model) is None and comm.traffic.calls == 0
    halves = Halves(model)
    halves(model, mx.array([PROMPT]), cache=make_prompt_cache(model))
    assert not hasattr(model, "pass_costs")  # a prompt as short is not worth it
    assert halves.costs() is None and model.pass_costs is None


@pytest.mark.ranks(3)
def test_measured_between_hosts(
    model: nn.Module, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks get the same, which does not touch the random numbers or the model."""
    monkeypatch.setattr(comm, "host", f"studio{comm.rank}")
    costs = measure(model)
    assert (
        costs is not None and costs.collectives == 3
    )  # two sums of its five are unread
    assert costs.computing.at(64) > 0 and costs.travelling.at(64) > 0
    assert len(set(comm.allgather_object(costs))) == 1


@pytest.mark.ranks(3)
def test_what_is_left_whole(
    model: nn.Module, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(comm, "take_turns", lambda *parts: taken.append(len(parts)))
    model.pass_costs = ALWAYS
    reader = Halves(model)
    reader(model, mx.array([PROMPT[:63]]), cache=make_prompt_cache(model))
    embeddings = mx.zeros((1, 121, 64))
    call = lambda *args, **options: None  # noqa: E731
    reader(call, mx.array([PROMPT]), cache=[], input_embeddings=embeddings)
    assert not taken


@pytest.mark.ranks(1, 3)
def test_a_full_window_that_keeps_its_first_tokens(
    comm: Communicator, always: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part of a prompt fits, and is read in halves; the second does not."""
    model = always(split("qwen2", comm))
    taken: list[int] = []
    real = comm.take_turns
    monkeypatch.setattr(comm, "take_turns", lambda *x: taken.append(len(x)) or real(*x))

    def read(reader: Callable[..., mx.array]) -> mx.array:
        caches = make_prompt_cache(model, max_kv_size=40)
        for part in (PROMPT[:35], PROMPT[35:]):
            reader(model, mx.array([part]), cache=caches)
        return model(mx.array([[7]]), cache=caches)

    whole = read(lambda call, tokens, **options: call(tokens, **options))
    assert mx.allclose(read(Halves(model)), whole, atol=1e-4)
    assert len(taken) == 1


@pytest.mark.ranks(3)
def test_over_eager_nothing_is_hidden(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "host", f"studio{comm.rank}")
    with over_eager(comm):
        assert measure(load_model(saved("llama", comm), comm)[0]) is None

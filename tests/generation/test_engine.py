"""Requests that join, leave and share: each gets the tokens that it gets alone."""


import mlx.core as mx
from driven import GREEDY, Driven
from equal import Tokens
from every_type import LONG, PROMPT, REPRESENTATIVES, RUNNABLE, for_types, split
from kept import kept
from metal_kernels import use_plain_operations
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from saved_types import saved

from mlxtp import Communicator

use_plain_operations()

# Longer than the windows of `zoo`, 8 tokens, several times; a little longer; shorter;
# and one token alone. They join and end one by one.
PROMPTS = {"a": LONG[:61], "b": LONG[61:84], "c": PROMPT[:5], "d": PROMPT[5:6]}
STEPS = {"a": 6, "b": 9, "c": 4, "d": 6}
# What a second turn adds to the first one of "a".
MORE = [7, 3, 11, 2]

QUICK = [*REPRESENTATIVES, "gemma2", "gpt_bigcode", "llama4"]


@for_types(RUNNABLE, QUICK)
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

"""What a rank computes between collectives, while all ranks do as in generation."""

import time
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.generate import generate_step

from mlxtp.comm.communicator import Communicator
from mlxtp.loading import load
from mlxtp.stories import PATH as STORIES

TOKENS = 24


class Accompanied(Communicator):
    """A world of one rank that waits for the others at each collective.

    It sends them what it has, and keeps that. So each rank computes a whole model, at
    the pace of all.
    """

    def __init__(self, others: Communicator) -> None:
        super().__init__()
        self._others = others
        self.waited_seconds = 0.0

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        mx.eval(x)
        begin = time.perf_counter()
        mx.eval(self._others.allreduce(x, at))
        self.waited_seconds += time.perf_counter() - begin
        return x

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str = "") -> mx.array:
        return self.allreduce(x, at)


def token_seconds(comm: Communicator) -> list[float]:
    """What a token of the model that ships takes each rank, without collectives.

    Its weights are little, so this is what mlx-lm's operations take, with Python, and
    an evaluation before each collective. Ranks that share cores get in each other's
    way as they will then: few short calls are interrupted, so the mean counts.
    """
    me = Accompanied(comm)
    with comm.unlimited():
        model, tokenizer = load(STORIES, me)
        comm.barrier()
    prompt = mx.array(tokenizer.encode("Once upon a time"))
    tokens = generate_step(prompt, model, max_tokens=-1)
    next(tokens)  # reads the prompt
    me.waited_seconds, begin = 0.0, time.perf_counter()
    for _ in range(TOKENS):
        next(tokens)
    seconds = time.perf_counter() - begin - me.waited_seconds
    return comm.allgather_object(seconds / TOKENS)

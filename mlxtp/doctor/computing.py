"""What a token takes a rank beside collectives, while all ranks compute one."""

import time
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.generate import generate_step

from mlxtp.comm.communicator import Communicator
from mlxtp.loading import load
from mlxtp.stories import PATH as STORIES

# So many tokens are timed.
TOKENS = 24


class PacedCommunicator(Communicator):
    """A world of one rank that makes a true collective with others for each of its own.

    The result is thrown away. So each rank computes a whole model, at the pace of all.
    `waited_seconds` is the time in collectives.
    """

    def __init__(self, others: Communicator) -> None:
        super().__init__()
        self._others = others
        self.waited_seconds = 0.0

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        """Return `x`, after an allreduce of it with the others."""
        mx.eval(x)
        begin = time.perf_counter()
        mx.eval(self._others.allreduce(x, at))
        self.waited_seconds += time.perf_counter() - begin
        return x

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str = "") -> mx.array:
        """Return `x`, after an allreduce of it with the others."""
        return self.allreduce(x, at)


def token_seconds(comm: Communicator) -> list[float]:
    """Return the seconds of a token of the model that ships, for each rank.

    Collectives are not counted. Reading the model's weights takes little, so this is
    the time of mlx-lm's operations, of Python, and of an evaluation before each
    collective. The mean counts: where ranks share cores, some calls are interrupted,
    and in generation they are too.

    Communicates: an allreduce for each collective of the model.
    """
    me = PacedCommunicator(comm)
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

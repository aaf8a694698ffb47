"""Sampled tokens that all ranks agree on where their machines differ."""

import mlx.core as mx
from mlx_lm.sample_utils import Sampler, greedy_sampler

from mlxtp.comm.communicator import Communicator


def agreed(sampler: Sampler | None, comm: Communicator) -> Sampler:
    """Make a sampler that gives every rank the tokens of rank 0.

    Every rank samples for itself, from logits that are the same bytes. Where machines
    differ, the last bits of what a sampler computes from them do so too, and with them
    now and then a token: each rank would go on with another text. Log-probabilities
    stay each rank's own.

    mlx-lm's loops feed back what the sampler returns, so one sampler is all that has to
    agree, in `generate_step`, `speculative_generate_step` and `BatchGenerator`.

    Args:
        sampler: log-probabilities (..., V) -> tokens (...); None is the greedy one.
        comm: the ranks.

    Returns: `sampler` itself where the machines are alike.

    Communicates: one broadcast of the tokens for each call, where machines differ.
    """
    sample = greedy_sampler if sampler is None else sampler
    if not comm.machines_differ:
        return sample

    def of_rank_0(logprobs: mx.array) -> mx.array:
        return comm.bcast(sample(logprobs), at="the sampler")

    return of_rank_0

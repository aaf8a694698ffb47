"""Heads that are no layer of their own."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.adapt import become
from mlxtp.layers.parallel import VocabParallel
from mlxtp.partition.spans import Span


def head_of_embedding(
    model: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Ask the embedding for the logits, where its weight would be multiplied by."""
    if not {"lm_head", "output"} & model.keys():
        become(model, _HeadOfEmbedding)


class _HeadOfEmbedding:
    def __call__(self: Any, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(inputs, cache=cache))


def gather_before_gain(
    model: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Gather the logits of a head that is a bare matrix, before they are scaled."""
    sizes = comm.allgather_object(model.lm_head.shape[0])
    model.lm_head_gain = _GatheredGain(
        model.lm_head_gain, comm, [Span(0, size) for size in sizes]
    )
    model.lm_head_gain.path = "lm_head"


class _GatheredGain(VocabParallel):
    """Scale gathered logits.

    Shapes: logits (..., V_r) sharded -> (..., V) replicated.
    Communicates: one allgather of (...)*V elements.
    """

    def __init__(self, gain: nn.Module, comm: Communicator, spans: list[Span]) -> None:
        super().__init__(comm, spans)
        self.gain = gain

    def __call__(self, logits: mx.array) -> mx.array:
        return self.gain(self._gather(logits))

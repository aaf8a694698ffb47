"""Heads that are no layer of their own."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.forward import Forward, change_forward
from mlxtp.layers.parallel import VocabParallel
from mlxtp.partition.spans import Span


def head_of_embedding(
    model: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Ask the embedding for the logits, where its weight would be multiplied by."""
    if not {"lm_head", "output"} & model.keys():
        change_forward(model, _head_of_embedding)


def _head_of_embedding(
    former: Forward, model: Any, inputs: mx.array, cache: Any = None
) -> mx.array:
    return model.model.embed_tokens.as_linear(model.model(inputs, cache=cache))


def gather_before_gain(
    model: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Gather the logits of a head that is a bare matrix, before they are scaled."""
    sizes = comm.allgather_object(model.lm_head.shape[0])
    model.lm_head_gain = _GatheredGain(
        model.lm_head_gain, comm, [Span(0, size) for size in sizes], "lm_head"
    )


class _GatheredGain(VocabParallel):
    """Scale gathered logits.

    Shapes: logits (..., V_r) sharded -> (..., V) replicated.
    Communicates: one allgather of (...)*V elements.
    """

    def __init__(
        self, gain: nn.Module, comm: Communicator, spans: list[Span], path: str
    ) -> None:
        super().__init__(comm, spans, path)
        self.gain = gain

    def __call__(self, logits: mx.array) -> mx.array:
        return self.gain(self._gather(logits))

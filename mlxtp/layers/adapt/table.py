"""The adapters by the names that blocks know them by."""

from collections.abc import Callable

import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.adapt import attention, mlp, recurrent, vocabulary

Adapter = Callable[[nn.Module, BlockShards, Communicator], None]

ADAPTERS: dict[str, Adapter] = {
    "any_packed_width": attention.any_packed_width,
    "attention.any_width": attention.any_width,
    "count_groups": attention.count_groups,
    "gather_before_gain": vocabulary.gather_before_gain,
    "head_of_embedding": vocabulary.head_of_embedding,
    "largest_of_all": mlp.largest_of_all,
    "latent_bias_once": mlp.latent_bias_once,
    "mask_of_batches": attention.mask_of_batches,
    "mask_of_own_heads": attention.mask_of_own_heads,
    "norm_together": attention.norm_together,
    "project_at_once": recurrent.project_at_once,
    "recurrent.any_width": recurrent.any_width,
    "step_uncompiled": recurrent.step_uncompiled,
    "sum_before_norm": mlp.sum_before_norm,
    "sum_of_some": mlp.sum_of_some,
    "take_own_inputs": mlp.take_own_inputs,
}

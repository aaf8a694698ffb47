"""Recurrent blocks: sums that would be made for every token of a prompt."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.forward import Forward, change_forward, twin


def project_at_once(mamba: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Project what decides the steps for all tokens at once, in one sum.

    mlx-lm asks for it token by token, after the convolution of all of them.
    """
    change_forward(mamba, _process_at_once, "_process_sequence")


def _process_at_once(
    former: Forward,
    mamba: Any,
    x: mx.array,
    conv_cache: mx.array | None,
    state_cache: mx.array | None,
) -> tuple[mx.array, tuple[mx.array, mx.array | None]]:
    """As mlx-lm's mamba, with its step, which is given what has been projected.

    Shapes: x (B, L, D) replicated -> (B, L, D) replicated; the caches
        (B, kernel - 1, channels_r) and (B, channels_r, state) sharded.
    Communicates: one allreduce of B*L*(rank + 2*state) elements, and the output's.
    """
    x, z = mx.split(mamba.in_proj(x), 2, axis=-1)
    before = mamba.conv_kernel_size - 1
    if conv_cache is None:
        padded = mx.pad(x, [(0, 0), (before, 0), (0, 0)])
    else:
        padded = mx.concatenate([conv_cache, x], axis=1)
    x = nn.silu(mamba.conv1d(padded))
    projected = mamba.x_proj(x)
    decay = -mx.exp(mamba.A_log)
    state, outputs = state_cache, []
    for token in range(x.shape[1]):
        step = twin(mamba, x_proj=lambda _, token=token: projected[:, token])
        y, state = step.ssm_step(x[:, token], decay, state)
        outputs.append(y)
    y = mx.stack(outputs, axis=1)
    return mamba.out_proj(swiglu(z, y)), (padded[:, -before:], state)


def step_uncompiled(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Decode without mx.compile, in which no collective can stand."""
    attention._step = attention._decode_core


def any_width(mixing: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Do without the assumption that all heads together are as wide as the input.

    What the norm over the heads returns is flattened to that width in the end.
    """
    change_forward(mixing.g_norm, _norm_to_flatten)


def _norm_to_flatten(former: Forward, norm: nn.Module, x: mx.array) -> "_Flattening":
    return _Flattening(former(norm, x))


class _Flattening:
    """Heads (B, L, heads, dims) that become (B, L, heads * dims), however many."""

    def __init__(self, x: mx.array) -> None:
        self._x = x

    def __add__(self, other: mx.array) -> "_Flattening":
        return _Flattening(self._x + other)

    def reshape(self, shape: list[int]) -> mx.array:
        return self._x.reshape(*shape[:2], -1)

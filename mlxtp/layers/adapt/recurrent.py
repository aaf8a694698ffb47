"""Recurrent blocks: sums that would be made for every token of a prompt."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards
from mlxtp.layers.adapt import become


def project_at_once(mamba: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Project what decides the steps for all tokens at once, in one sum.

    mlx-lm asks for it token by token, after the convolution of all of them.
    """
    mamba.x_proj = _Steps(mamba.x_proj)
    mamba.conv1d = _BeforeSteps(mamba.conv1d, mamba.x_proj)


class _Steps(nn.Module):
    """Give one step after the other of what was projected at once.

    Shapes: x (B, L, channels_r) sharded at once, then (B, channels_r) -> (B, out).
    """

    def __init__(self, x_proj: nn.Module) -> None:
        super().__init__()
        self.x_proj = x_proj
        self._steps: list[mx.array] = []

    def begin(self, x: mx.array) -> None:
        projected = self.x_proj(x)
        self._steps = [projected[:, i] for i in reversed(range(x.shape[1]))]

    def __call__(self, x: mx.array) -> mx.array:
        return self._steps.pop()


class _BeforeSteps(nn.Module):
    def __init__(self, conv1d: nn.Module, steps: _Steps) -> None:
        super().__init__()
        self.conv1d = conv1d
        self._steps = steps

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv1d(x)
        self._steps.begin(nn.silu(y))
        return y


def step_uncompiled(
    attention: nn.Module, shards: BlockShards, comm: Communicator
) -> None:
    """Decode without mx.compile, in which no collective can stand."""
    attention._step = attention._decode_core


def any_width(mixing: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Do without the assumption that all heads together are as wide as the input.

    What the norm over the heads returns is flattened to that width in the end.
    """
    become(mixing.g_norm, _FlattenedLater)


class _FlattenedLater:
    def __call__(self: Any, x: mx.array) -> "_Flattening":
        return _Flattening(super().__call__(x))  # type: ignore[misc]


class _Flattening:
    """Heads (B, L, heads, dims) that become (B, L, heads * dims), however many."""

    def __init__(self, x: mx.array) -> None:
        self._x = x

    def __add__(self, other: mx.array) -> "_Flattening":
        return _Flattening(self._x + other)

    def reshape(self, shape: list[int]) -> mx.array:
        return self._x.reshape(*shape[:2], -1)

"""MLPs and experts: what has to be known of all columns or all experts at once."""

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards, base
from mlxtp.layers.adapt import become


def largest_of_all(mlp: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Cut off below what the mean and deviation of all ranks' columns say."""
    become(mlp, _LargestOfAll)
    mlp._allreduce = comm.allreduce
    mlp._path = shards.path
    mlp._width = shards.counts["w"]


class _LargestOfAll:
    """Communicates: one allreduce of 2*B*L elements, besides the MLP's own."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        wide = gate.astype(mx.float32)
        sums = mx.concatenate(
            [wide.sum(-1, keepdims=True), mx.square(wide).sum(-1, keepdims=True)], -1
        )
        means = self._allreduce(sums, self._path) / self._width
        mean, of_squares = means[..., :1], means[..., 1:]
        deviation = mx.sqrt(mx.maximum(of_squares - mx.square(mean), 0))
        cutoff = (mean + deviation * self._std_multiplier).astype(gate.dtype)
        return self.down_proj(
            nn.gelu_approx(mx.maximum(0, gate - cutoff)) * self.up_proj(x)
        )


def latent_bias_once(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Count the bias of a projection out of a latent once: its input is partial."""
    layer = base(block.get("fc2_latent_proj", block))
    if "bias" in layer:
        layer.bias = layer.bias * (comm.rank == 0)


def sum_before_norm(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Sum routed and shared experts in one allreduce, before the norm of the former."""
    become(block, _SumBeforeNorm)
    block._allreduce = comm.allreduce
    block._path = shards.path
    block._select = sys.modules[type(block).__mro__[2].__module__]._group_expert_select


class _SumBeforeNorm:
    """Communicates: one allreduce of B*L*(latent + D) elements."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        args = self.args
        which, weights = self._select(
            self.gate(x),
            self.e_score_correction_bias,
            args.num_experts_per_token,
            args.num_expert_group,
            args.topk_group,
            args.routed_scaling_factor,
            args.moe_renormalize,
        )
        is_latent = self.latent_size is not None
        y = self.switch_mlp(self.routed_expert_down_proj(x) if is_latent else x, which)
        parts = [(y * weights[..., None]).sum(axis=-2)]
        if self.shared_experts is not None:
            parts.append(self.shared_experts(x))
        width = parts[0].shape[-1]
        total = self._allreduce(mx.concatenate(parts, axis=-1), self._path)
        y = total[..., :width]
        if self.routed_expert_norm is not None:
            y = self.routed_expert_norm(y)
        if is_latent:
            y = self.routed_expert_up_proj(y)
        return y + total[..., width:] if len(parts) > 1 else y


def sum_of_some(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Sum the experts that compute; those that pass their input on are whole."""
    become(block, _SumOfSome)
    block._allreduce = comm.allreduce
    block._path = shards.path


class _SumOfSome:
    """Communicates: one allreduce of B*L*D elements."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        which, weights = self.router(x)
        passes = which >= self.n_routed_experts
        computing = mx.where(passes, 0.0, weights)[..., None]
        y = (self.switch_mlp(x, mx.where(passes, 0, which)) * computing).sum(axis=-2)
        passed = mx.where(passes, weights, 0.0).sum(axis=-1, keepdims=True)
        return self._allreduce(y, self._path) + x * passed


def take_own_inputs(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Give a row-parallel matrix its part of an input that every rank has whole."""
    block.linear = _OwnInputs(block.linear, shards.parts[comm.rank].spans["w"][0])


class _OwnInputs(nn.Module):
    def __init__(self, linear: nn.Module, span: tuple[int, int]) -> None:
        super().__init__()
        self.linear = linear
        self._own = slice(*span)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x[..., self._own])

"""MLPs and experts: what has to be known of all columns or all experts at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.families.blocks import BlockShards, base
from mlxtp.layers.forward import Forward, change_forward
from mlxtp.partition.spans import Span


def largest_of_all(mlp: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Cut off below what the mean and deviation of all ranks' columns say."""
    change_forward(mlp, _LargestOfAll(comm, shards.path, shards.counts["w"]))


@dataclass(frozen=True)
class _LargestOfAll:
    """Gemma 3n's sparse MLP, `width` columns on all ranks together.

    Shapes: x (B, L, D) replicated -> (B, L, D) replicated.
    Communicates: one allreduce of 2*B*L elements, besides the MLP's own.
    """

    comm: Communicator
    path: str
    width: int

    def __call__(self, former: Forward, mlp: Any, x: mx.array) -> mx.array:
        gate = mlp.gate_proj(x)
        wide = gate.astype(mx.float32)
        sums = mx.concatenate(
            [wide.sum(-1, keepdims=True), mx.square(wide).sum(-1, keepdims=True)], -1
        )
        means = self.comm.allreduce(sums, self.path) / self.width
        mean, of_squares = means[..., :1], means[..., 1:]
        deviation = mx.sqrt(mx.maximum(of_squares - mx.square(mean), 0))
        cutoff = (mean + deviation * mlp._std_multiplier).astype(gate.dtype)
        return mlp.down_proj(
            nn.gelu_approx(mx.maximum(0, gate - cutoff)) * mlp.up_proj(x)
        )


def latent_bias_once(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Count the bias of a projection out of a latent once: its input is partial."""
    layer = base(block.get("fc2_latent_proj", block))
    if "bias" in layer:
        layer.bias = layer.bias * (comm.rank == 0)


def sum_before_norm(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Sum routed and shared experts in one allreduce, before the norm of the former."""
    from mlx_lm.models.kimi_k3 import _group_expert_select

    change_forward(block, _SumBeforeNorm(comm, shards.path, _group_expert_select))


@dataclass(frozen=True)
class _SumBeforeNorm:
    """Kimi K3's experts, with the sum where it is still linear.

    Args:
        choose: mlx-lm's function that chooses experts by their scores.

    Shapes: x (B, L, D) replicated -> (B, L, D) replicated.
    Communicates: one allreduce of B*L*(latent + D) elements.
    """

    comm: Communicator
    path: str
    choose: Callable[..., tuple[mx.array, mx.array]]

    def __call__(self, former: Forward, block: Any, x: mx.array) -> mx.array:
        args = block.args
        which, weights = self.choose(
            block.gate(x),
            block.e_score_correction_bias,
            args.num_experts_per_token,
            args.num_expert_group,
            args.topk_group,
            args.routed_scaling_factor,
            args.moe_renormalize,
        )
        is_latent = block.latent_size is not None
        latent = block.routed_expert_down_proj(x) if is_latent else x
        y = block.switch_mlp(latent, which)
        parts = [(y * weights[..., None]).sum(axis=-2)]
        if block.shared_experts is not None:
            parts.append(block.shared_experts(x))
        width = parts[0].shape[-1]
        total = self.comm.allreduce(mx.concatenate(parts, axis=-1), self.path)
        y = total[..., :width]
        if block.routed_expert_norm is not None:
            y = block.routed_expert_norm(y)
        if is_latent:
            y = block.routed_expert_up_proj(y)
        return y + total[..., width:] if len(parts) > 1 else y


def sum_of_some(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Sum the experts that compute; those that pass their input on are whole."""
    change_forward(block, _SumOfSome(comm, shards.path))


@dataclass(frozen=True)
class _SumOfSome:
    """LongCat's experts, some of which give their input.

    Shapes: x (B, L, D) replicated -> (B, L, D) replicated.
    Communicates: one allreduce of B*L*D elements.
    """

    comm: Communicator
    path: str

    def __call__(self, former: Forward, block: Any, x: mx.array) -> mx.array:
        which, weights = block.router(x)
        passes = which >= block.n_routed_experts
        computing = mx.where(passes, 0.0, weights)[..., None]
        y = (block.switch_mlp(x, mx.where(passes, 0, which)) * computing).sum(axis=-2)
        passed = mx.where(passes, weights, 0.0).sum(axis=-1, keepdims=True)
        return self.comm.allreduce(y, self.path) + x * passed


def take_own_inputs(block: nn.Module, shards: BlockShards, comm: Communicator) -> None:
    """Give a row-parallel matrix its part of an input that every rank has whole."""
    block.linear = _OwnInputs(block.linear, shards.parts[comm.rank].spans["w"][0])


class _OwnInputs(nn.Module):
    """Shapes: x (..., in) replicated -> x_r (..., in_r) sharded -> y (..., out)."""

    def __init__(self, linear: nn.Module, span: Span) -> None:
        super().__init__()
        self.linear = linear
        self._own = slice(*span)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x[..., self._own])

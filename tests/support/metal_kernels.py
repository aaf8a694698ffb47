"""What mlx-lm writes as Metal kernels alone, in plain operations for the CPU.

Models that need them run here as well: bitnet, muse_spark.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models import bitlinear_layers, muse_spark

from mlxtp.layers.ternary import unpack


def use_plain_operations() -> None:
    """Put these in the kernels' place, where there is no Metal."""
    if mx.metal.is_available():
        return
    bitlinear_layers.BitLinear.execute_matmul_kernel = ternary_matmul
    for kernel in (
        expert_routing,
        norm_add_norm,
        post_expert_norm_combine,
        qk_norm,
        qk_norm_rope,
        rms_norm_sigmoid_gate,
    ):
        setattr(muse_spark, kernel.__name__, kernel)


def ternary_matmul(self: Any, x: mx.array, packed: mx.array) -> mx.array:
    weight = unpack(packed).astype(x.dtype) - 1
    scale = self.weight_scale
    return (x @ weight.T) * (1 / scale if self.invert_weight_scales else scale)


def _normed(x: mx.array, eps: float) -> mx.array:
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + eps)


def expert_routing(
    logits, bias, *, top_k, multiplier, score_eps, route_scale
) -> list[mx.array]:
    scores = mx.sigmoid(logits * multiplier)
    which = mx.argsort(-(scores + bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, which, axis=-1)
    total = weights.sum(axis=-1, keepdims=True) + score_eps
    return [which, weights / total * route_scale]


def norm_add_norm(
    branch, stream, *, alpha, beta, post_weight, post_eps, next_norm
) -> tuple[mx.array, mx.array | None]:
    scaled = branch if post_weight is None else (post_weight * branch)
    normed = _normed(scaled.astype(branch.dtype), post_eps).astype(branch.dtype)
    stream = alpha * stream + beta * normed.astype(mx.float32)
    if next_norm is None:
        return stream, None
    following = _normed(stream, next_norm.eps) * next_norm.weight
    return stream, following.astype(branch.dtype)


def post_expert_norm_combine(experts, weights, *, norm_weight, eps) -> mx.array:
    normed = _normed(experts.astype(mx.float32) * norm_weight, eps)
    return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale) -> list[mx.array]:
    width, kv_width = n_heads * head_dim, n_kv_heads * head_dim
    queries = qkvg[..., :width].reshape(*qkvg.shape[:-1], n_heads, head_dim)
    keys = qkvg[..., width : width + kv_width]
    keys = keys.reshape(*qkvg.shape[:-1], n_kv_heads, head_dim)
    queries, keys = (_normed(x, eps).astype(qkvg.dtype) for x in (queries, keys))
    return [queries * query_scale, keys]


def qk_norm_rope(qkvg, *, rope_base, offset, **norm) -> list[mx.array]:
    def rotated(x: mx.array) -> mx.array:
        x = mx.fast.rope(
            x.swapaxes(-3, -2), norm["head_dim"], traditional=True, base=rope_base,
            scale=1.0, offset=offset,
        )  # fmt: skip
        return x.swapaxes(-3, -2)

    return [rotated(x) for x in qk_norm(qkvg, **norm)]


def rms_norm_sigmoid_gate(x, gate, *, eps) -> mx.array:
    normed = _normed(x, eps).transpose(0, 2, 1, 3).flatten(2)
    return (normed * mx.sigmoid(gate.astype(mx.float32))).astype(x.dtype)

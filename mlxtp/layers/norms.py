"""Norms over an axis that is shared out among ranks."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxtp.comm.communicator import Communicator
from mlxtp.partition.spans import Spans, keeps_groups_whole


class NormShard:
    """What a rank knows of a norm over an axis: which elements it has, of how many.

    The axis is normed in `groups` of equal length, each for itself. An element that
    several ranks have counts on the first of them alone.
    """

    def __init__(
        self, features: int, spans: Sequence[Spans], rank: int, groups: int = 1
    ) -> None:
        """Take all ranks' `spans` of an axis of `features`."""
        size = features // groups
        mine = spans[rank].indices
        before = {i for other in spans[:rank] for i in other.indices}
        self.size = size
        self.groups = groups
        member = mx.array([i // size for i in mine])[:, None] == mx.arange(groups)
        counts = mx.array([i not in before for i in mine])[:, None]
        self._member = member.astype(mx.float32)  # (local features, groups)
        self._counted = (member & counts).astype(mx.float32)
        self.is_local = keeps_groups_whole(spans, size)

    def squares(self, x: mx.array) -> mx.array:
        """This rank's sums of squares: x (..., local features) -> (..., groups)."""
        return mx.square(x.astype(mx.float32)) @ self._counted

    def normed(
        self, x: mx.array, squares: mx.array, eps: float, weight: mx.array | None
    ) -> mx.array:
        """x / sqrt(mean of squares + eps) * weight, rounded as mx.fast.rms_norm does.

        That is before the weight, to the wider dtype of x and weight.

        Shapes: x (..., local features), squares of all ranks (..., groups), weight
            (local features,) -> (..., local features).
        """
        scale = mx.rsqrt(squares / self.size + eps) @ self._member.T
        y = x.astype(mx.float32) * scale
        if weight is None:
            return y.astype(x.dtype)
        # Of two floating dtypes that differ, the wider is float32 in MLX.
        return (y.astype(x.dtype) if weight.dtype == x.dtype else y) * weight


class RMSNormOverRanks(nn.Module):
    """RMSNorm over an axis of which every rank has a part, with a gate if there is one.

    y = x / sqrt(mean(x^2) + eps) * w; with a gate z, x * silu(z) is normed, or the
    norm is multiplied by silu(z) if the norm comes first.

    Shapes: x, z (..., in_r) sharded -> y (..., in_r) sharded.
    Communicates: one allreduce of (...)*groups elements, in float32; nothing if every
        rank has its groups whole.
    """

    def __init__(
        self,
        norm: nn.Module,
        shard: NormShard,
        comm: Communicator,
        path: str,
        *,
        is_in_groups: bool,
    ) -> None:
        """Take the place of `norm` at `path`, whose weight is this rank's.

        With `is_in_groups` the norm is one of groups, of which there may be one.
        """
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "eps", None) or norm.variance_epsilon
        self.gate_last = getattr(norm, "norm_before_gate", False)
        self.is_in_groups = is_in_groups
        self.comm, self._path = comm, path
        self.shard = shard

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        """Norm this rank's part of x."""
        if gate is not None and not self.gate_last:
            x = nn.silu(gate) * x
        squares = self.shard.squares(x)
        if not self.shard.is_local:
            squares = self.comm.allreduce(squares, self._path)
        if self.is_in_groups:  # mlx-lm rounds to x's dtype before the weight
            y = self.shard.normed(x, squares, self.eps, None) * self.weight
        else:
            y = self.shard.normed(x, squares, self.eps, self.weight)
        return nn.silu(gate) * y if gate is not None and self.gate_last else y

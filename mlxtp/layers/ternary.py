"""Ternary weights of BitNet: a byte holds four outputs, a quarter of them all apart.

(mlx-lm's BitLinear, after Wang et al., 2023, arXiv:2310.11453.)
"""

import mlx.core as mx
import mlx.nn as nn

from mlxtp.partition.spans import Spans


def unpack(weight: mx.array) -> mx.array:
    """Bytes (out/4, in) -> codes 0, 1, 2 (out, in): output i is in row i mod out/4."""
    return mx.concatenate([(weight >> (2 * part)) & 3 for part in range(4)], axis=0)


def pack(codes: mx.array) -> mx.array:
    """The opposite of `unpack`."""
    parts = mx.split(codes, 4, axis=0)
    packed = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (2 * number))
    return packed


def repacked(linear: nn.Module, spans: Spans, rows: Spans) -> nn.Module:
    """Keep the outputs `spans` of a layer that holds the bytes of `rows`."""
    offsets = rows.offsets
    quarter = linear.out_features // 4
    own = [offsets[i % quarter] + (i // quarter) * rows.length for i in spans.indices]
    linear.weight = pack(unpack(linear.weight)[mx.array(own)])
    linear.out_features = len(own)
    mx.eval(linear.weight)
    return linear

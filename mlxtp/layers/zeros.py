"""Zeros that make a rectangle of a rank's query heads, for grouped-query attention.

A rank that shares a KV head with another may have fewer query heads under it than under
its others. In place of a column of W_q of zeros, its output is zero; in place of a row
of W_o of zeros, its input is left out. So nothing is held or read for them, and the sum
is the same. No rank's attention reads more keys and values for them, either.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.layers.forward import Forward
from mlxtp.partition.layouts import Fill


def with_zeros(x: mx.array, fill: Fill, axis: int = -1) -> mx.array:
    """Put zeros among features: the axis gets as long as `fill` says."""
    pieces, start = [], 0
    axis %= x.ndim
    for zeros, length in fill:
        if zeros:
            shape = (*x.shape[:axis], zeros, *x.shape[axis + 1 :])
            pieces.append(mx.zeros(shape, x.dtype))
        if length:
            at = (slice(None),) * axis + (slice(start, start + length),)
            pieces.append(x[at])
        start += length
    return mx.concatenate(pieces, axis)


def without_zeros(x: mx.array, fill: Fill) -> mx.array:
    """Leave out of the last axis what `with_zeros` has put there."""
    pieces, start = [], 0
    for zeros, length in fill:
        start += zeros
        if length:
            pieces.append(x[..., start : start + length])
        start += length
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, -1)


@dataclass(frozen=True)
class OutputsWithZeros:
    """The forward pass of a column-parallel layer, with zeros among its outputs.

    Shapes: x (..., D) -> y (..., features of the rectangle).
    """

    fill: Fill

    def __call__(
        self, former: Forward, layer: nn.Module, *args: Any, **options: Any
    ) -> mx.array:
        """Multiply and fill up."""
        return with_zeros(former(layer, *args, **options), self.fill)


@dataclass(frozen=True)
class InputsWithoutZeros:
    """The forward pass of a row-parallel layer behind a filled-up attention.

    Shapes: x (..., features of the rectangle) -> y (..., D).
    Communicates: what the layer does.
    """

    fill: Fill

    def __call__(
        self, former: Forward, layer: nn.Module, x: mx.array, *args: Any, **options: Any
    ) -> mx.array:
        """Leave zeros out and multiply."""
        return former(layer, without_zeros(x, self.fill), *args, **options)

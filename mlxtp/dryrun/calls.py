"""What a call of a layer takes: bytes read, products, and what it gives out."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.families.blocks import base
from mlxtp.layers.forward import Forward, change_forward


@dataclass(frozen=True)
class Call:
    """A layer that is called: where the model has it, and what that takes."""

    path: str
    read_bytes: float
    flops: float
    made_bytes: int


def watch(model: nn.Module, calls: list[Call]) -> None:
    """Let the layers that have weights write into `calls` what each call takes."""
    for path, module in model.named_modules():
        own = [a for name, a in module.items() if _is_parameter(name, a)]
        if own:
            change_forward(module, _Watched(path, own, calls).call)
            if hasattr(module, "as_linear"):
                change_forward(
                    module, _Watched(path, own, calls).as_linear, "as_linear"
                )


def _is_parameter(name: str, value: Any) -> bool:
    return isinstance(value, mx.array) and not name.startswith("_")


@dataclass(frozen=True)
class _Watched:
    """Forward passes of the layer at `path` that write what they take into `calls`."""

    path: str
    own: list[mx.array]
    calls: list[Call]

    def call(
        self, former: Forward, layer: nn.Module, *args: Any, **options: Any
    ) -> Any:
        y = former(layer, *args, **options)
        x, *rest = (*args, *options.values())
        self.calls.append(_called(layer, self.path, self.own, x, rest, y))
        return y

    def as_linear(self, former: Forward, layer: nn.Module, x: mx.array) -> mx.array:
        y = former(layer, x)
        size = sum(array.nbytes for array in self.own)
        flops = 2.0 * _elements(layer) * x.size / x.shape[-1]
        self.calls.append(Call(self.path, size, flops, y.nbytes))
        return y


def _called(
    layer: nn.Module, path: str, own: list[mx.array], x: Any, rest: Any, y: Any
) -> Call:
    size = sum(array.nbytes for array in own)
    made = y.nbytes if isinstance(y, mx.array) else 0
    if not isinstance(x, mx.array) or not x.ndim:
        return Call(path, size, 0.0, made)
    if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        return Call(path, size / own[0].shape[0] * x.size, 0.0, made)
    if "weight" not in layer or layer.weight.ndim < 2:
        return Call(path, size, 0.0, made)
    tokens = x.size / x.shape[-1]
    elements = _elements(layer)
    which = next((a for a in rest if _is_choice(a)), None)
    if which is not None and layer.weight.ndim == 3:
        experts = layer.weight.shape[0]
        return Call(
            path,
            size * _different(experts, which) / experts,
            2.0 * elements / experts * which.size,
            made,
        )
    return Call(path, size, 2.0 * elements * tokens, made)


def _is_choice(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.integer)


def _different(experts: int, which: mx.array) -> float:
    """How many experts are chosen, if every token chooses evenly."""
    chosen = which.shape[-1] if which.ndim > 1 else 1
    tokens = which.size / chosen
    return experts * (1 - (1 - chosen / experts) ** tokens)


def _elements(layer: nn.Module) -> int:
    """Of the weight, unpacked."""
    if "scales" in layer:
        return int(layer.scales.size * base(layer).group_size)
    return int(layer.weight.size)

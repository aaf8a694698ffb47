"""What the call of a layer takes: bytes read, arithmetic, and bytes of its output."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtp.families.blocks import base
from mlxtp.layers.forward import Forward, change_forward


@dataclass(frozen=True)
class Call:
    """A call of the layer at `path`.

    For `tokens` tokens it reads `read_bytes` bytes of weights, makes `flops`
    floating-point operations and returns `output_bytes` bytes. A token alone reads
    `share` of the layer's weights: less than 1 of experts, and of an embedding.
    """

    path: str
    read_bytes: float
    flops: float
    output_bytes: int
    tokens: float = 1.0
    share: float = 1.0

    def times(self, factor: float) -> "Call":
        """Return the same call for `factor` times as many tokens.

        Tokens read what they have in common once, if each chooses evenly.
        """
        tokens = factor * self.tokens
        read = self.read_bytes
        if self.share < 1:
            read *= _read_share(self.share, tokens)
            read /= _read_share(self.share, self.tokens)
        return Call(
            self.path,
            read,
            factor * self.flops,
            round(factor * self.output_bytes),
            tokens,
            self.share,
        )


def _read_share(share: float, tokens: float) -> float:
    """The expected share of the weights that so many tokens read."""
    return 1 - (1 - share) ** tokens


def record_calls(model: nn.Module, calls: list[Call]) -> None:
    """Let every layer with weights append to `calls` what each of its calls takes."""
    for path, module in model.named_modules():
        own = [a for name, a in module.items() if _is_parameter(name, a)]
        if own:
            recorder = _Recorder(path, own, calls)
            change_forward(module, recorder.call)
            if hasattr(module, "as_linear"):
                change_forward(module, recorder.as_linear, "as_linear")


def _is_parameter(name: str, value: Any) -> bool:
    return isinstance(value, mx.array) and not name.startswith("_")


@dataclass(frozen=True)
class _Recorder:
    """Forward passes of the layer at `path` that write what they take into `calls`."""

    path: str
    own: list[mx.array]
    calls: list[Call]

    def call(
        self, former: Forward, layer: nn.Module, *args: Any, **options: Any
    ) -> Any:
        y = former(layer, *args, **options)
        x, *rest = (*args, *options.values())
        self.calls.append(_call(layer, self.path, self.own, x, rest, y))
        return y

    def as_linear(self, former: Forward, layer: nn.Module, x: mx.array) -> mx.array:
        y = former(layer, x)
        size = sum(array.nbytes for array in self.own)
        tokens = x.size / x.shape[-1]
        flops = 2.0 * _elements(layer) * tokens
        self.calls.append(Call(self.path, size, flops, y.nbytes, tokens))
        return y


def _call(
    layer: nn.Module, path: str, own: list[mx.array], x: Any, others: Any, y: Any
) -> Call:
    size = sum(array.nbytes for array in own)
    output = y.nbytes if isinstance(y, mx.array) else 0
    if not isinstance(x, mx.array) or not x.ndim:
        return Call(path, size, 0.0, output)
    if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        rows = own[0].shape[0]
        return Call(path, size / rows * x.size, 0.0, output, x.size, 1 / rows)
    tokens = x.size / x.shape[-1]
    if "weight" not in layer or layer.weight.ndim < 2:
        return Call(path, size, 0.0, output, tokens)
    elements = _elements(layer)
    chosen = next((a for a in others if _is_choice(a)), None)
    if chosen is not None and layer.weight.ndim == 3:
        experts = layer.weight.shape[0]
        per_token = chosen.shape[-1] if chosen.ndim > 1 else 1
        tokens, share = chosen.size / per_token, per_token / experts
        return Call(
            path,
            size * _read_share(share, tokens),
            2.0 * elements / experts * chosen.size,
            output,
            tokens,
            share,
        )
    return Call(path, size, 2.0 * elements * tokens, output, tokens)


def _is_choice(value: Any) -> bool:
    """Whether an argument says which experts each token chooses."""
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.integer)


def _elements(layer: nn.Module) -> int:
    """The number of elements of the unpacked weight."""
    if "scales" in layer:
        return int(layer.scales.size * base(layer).group_size)
    return int(layer.weight.size)

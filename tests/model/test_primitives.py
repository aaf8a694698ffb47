"""Each primitive by the region gives what MLX makes of the whole, cut afterwards."""

from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp.model.primitives import PRIMITIVES, take, whole
from mlxtp.partition.spans import Spans

pytestmark = pytest.mark.once

A = mx.arange(24).reshape(4, 6)
B = mx.arange(24, 48).reshape(4, 6)
F = mx.sin(mx.arange(4 * 96).reshape(4, 96))
PLACES = mx.array([[5, 0], [2, 2], [3, 1]])
# The primitive, its arguments, its inputs, and what MLX makes of them.
CASES: dict[str, tuple[str, tuple, list[mx.array], Callable[..., mx.array]]] = {
    "rows joined": ("Concatenate", (0,), [A, B], lambda a, b: mx.concatenate([a, b])),
    "columns joined": (
        "Concatenate",
        (1,),
        [A, B, A],
        lambda a, b, c: mx.concatenate([a, b, c], 1),
    ),
    "transposed": ("Transpose", ([1, 0],), [A], lambda a: a.T),
    "every second column": (
        "Slice",
        ([0, 1], [4, 6], [1, 2]),
        [A],
        lambda a: a[:, 1::2],
    ),
    "flattened": ("Reshape", (), [A], lambda a: a.reshape(24)),
    "regrouped": ("Reshape", (), [A], lambda a: a.reshape(2, 2, 2, 3)),
    "spread out": ("Broadcast", (), [A[:1]], lambda a: mx.broadcast_to(a, (3, 6))),
    "added": ("Add", (), [A, B], lambda a, b: a + b),
    "shifted": ("BitwiseBinary", (3,), [A, B], mx.left_shift),
    "counted": ("Arange", (2.0, 14.0, 3.0), [], lambda: mx.arange(2.0, 14.0, 3.0)),
    "summed": ("Reduce", (2, [1]), [A], lambda a: a.sum(1, keepdims=True)),
    "largest": ("ArgReduce", (1, 0), [A], lambda a: a.argmax(0, keepdims=True)),
    "chosen": (
        "Gather",
        ([1], (4, 1)),
        [A, PLACES],
        lambda a, places: mx.take(a, places, 1).transpose(1, 2, 0)[..., None],
    ),
    "quantized": ("Quantize", (32, 3, 0, False), [F], lambda f: mx.quantize(f, 32, 3)),
    "dequantized": (
        "Quantize",
        (32, 3, 0, True),
        [*mx.quantize(F, 32, 3)],
        lambda *packed: mx.dequantize(*packed, 32, 3),
    ),
    "dequantized mxfp4": (
        "Quantize",
        (32, 4, 1, True),
        [*mx.quantize(F, 32, 4, "mxfp4")],
        lambda *packed: mx.dequantize(*packed, None, 32, 4, "mxfp4"),
    ),
}


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
def test_a_region_is_that_of_the_whole(case: str, data: st.DataObject) -> None:
    name, arguments, inputs, compute = CASES[case]
    expected, output = compute(*inputs), 0
    if isinstance(expected, list):
        output = data.draw(st.integers(0, len(expected) - 1))
        expected = expected[output]
    region = tuple(
        Spans(sorted(map(tuple, map(sorted, data.draw(pairs(size))))))
        for size in expected.shape
    )
    region = tuple(
        spans.merged() if spans.length else Spans.whole(size)
        for spans, size in zip(region, expected.shape, strict=True)
    )
    node = SimpleNamespace(
        arguments=arguments,
        inputs=inputs,
        output=output,
        shape=expected.shape,
        dtype=expected.dtype,
    )
    needed = PRIMITIVES[name](node, region)
    assert needed is not None
    parts = [
        take(x, whole(x.shape), wanted)
        for x, wanted in zip(inputs, needed.regions, strict=True)
        if wanted is not None
    ]
    got = needed.compute(parts)
    assert got.dtype == expected.dtype
    assert mx.array_equal(got, take(expected, whole(expected.shape), region))


def pairs(size: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Two edges for each of one or two spans of an axis."""
    edge = st.integers(0, size)
    return st.lists(st.tuples(edge, edge), min_size=1, max_size=2)

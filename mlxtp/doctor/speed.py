"""How fast a rank computes, measured while the others do the same."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

# The types of weights: MLX's type, or the bits of a quantized matrix.
DTYPES: dict[str, mx.Dtype | int] = {
    "bfloat16": mx.bfloat16,
    "float16": mx.float16,
    "float32": mx.float32,
    "8bit": 8,
    "4bit": 4,
}
GROUP_SIZE = 64

# A matrix of 4096 x 4096 is larger than the processor's caches. Beside four of them the
# start of an evaluation takes little.
WIDTH = 4096
MATRICES = 4
SECONDS = 0.5

# Square matrices of these widths are tried, up to the first whose product is as long.
PRODUCT_WIDTHS = (512, 1024, 2048, 4096)
PRODUCT_SECONDS = 0.02


@dataclass(frozen=True)
class Speed:
    """The rates of a rank.

    `bytes_per_second` is the rate at which matrix-vector products read weights, `flops`
    the floating-point operations of matrix products a second.
    """

    bytes_per_second: float
    flops: float


def measure(dtype: str, barrier: Callable[[], None]) -> Speed:
    """Measure this rank, while all others do the same.

    Args:
        dtype: of the weights, one of `DTYPES`.
        barrier: waits for all ranks.
    """
    kind = DTYPES[dtype]
    kept = kind if isinstance(kind, mx.Dtype) else mx.bfloat16
    x = mx.ones((1, WIDTH), kept)
    products = [_product(kind) for _ in range(MATRICES)]
    nbytes = sum(nbytes for _, nbytes in products)
    square = _square(kept)

    def read() -> None:
        mx.eval(*(product(x) for product, _ in products))

    def multiply() -> None:
        mx.eval(square @ square)

    results = []
    for work in read, multiply:
        work()
        barrier()
        results.append(_seconds(work))
    reading, multiplying = results
    flops = 2 * square.shape[0] ** 3 / multiplying
    return Speed(nbytes / reading, flops)


def _seconds(work: Callable[[], None]) -> float:
    """The mean over a fixed time, so that all ranks work at the same time."""
    begin = time.perf_counter()
    count, seconds = 0, 0.0
    while not count or seconds < SECONDS:
        work()
        count += 1
        seconds = time.perf_counter() - begin
    return seconds / count


def _product(kind: mx.Dtype | int) -> tuple[Callable[[mx.array], mx.array], int]:
    """A product with a new matrix, and the bytes that it reads."""
    if isinstance(kind, mx.Dtype):
        weight = mx.ones((WIDTH, WIDTH), kind)
        mx.eval(weight)
        return lambda x: x @ weight.T, weight.nbytes
    packed = mx.zeros((WIDTH, WIDTH * kind // 32), mx.uint32)
    scales = mx.ones((WIDTH, WIDTH // GROUP_SIZE), mx.bfloat16)
    parts = packed, scales, mx.zeros_like(scales)
    mx.eval(*parts)

    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, *parts, True, GROUP_SIZE, kind)

    return product, sum(part.nbytes for part in parts)


def _square(dtype: mx.Dtype) -> mx.array:
    """A square matrix that takes a measurable time to multiply by itself."""
    square = mx.zeros((0, 0))
    for width in PRODUCT_WIDTHS:
        square = mx.ones((width, width), dtype)
        mx.eval(square)
        begin = time.perf_counter()
        mx.eval(square @ square)
        if time.perf_counter() - begin > PRODUCT_SECONDS:
            break
    return square

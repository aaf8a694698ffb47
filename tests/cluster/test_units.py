"""Bytes as people read them, and times between measured sizes."""

import pytest

from mlxtp.cluster.curve import interpolate
from mlxtp.cluster.units import binary_size, gigabytes

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    "nbytes, decimals, text",
    [
        (48e9, 1, "48.0"),
        (51.54e9, 2, "51.54"),
        (-2.111e9, 2, "-2.11"),
        (549_000_000, 2, "0.549"),
        (0, 1, "0"),
    ],
)
def test_gigabytes(nbytes: float, decimals: int, text: str) -> None:
    assert gigabytes(nbytes, decimals) == text


def test_binary_sizes() -> None:
    sizes = [256, 1024, 1536, 1 << 20, 3 << 19]
    assert [binary_size(size) for size in sizes] == [
        *("256 B", "1 KiB", "1.5 KiB", "1 MiB", "1.5 MiB")
    ]


def test_times_between_measured_sizes() -> None:
    sizes, seconds = (1000, 2000), (2.0, 3.0)
    times = [interpolate(n, sizes, seconds) for n in (10, 1500, 2000, 4000)]
    assert times == [2.0, 2.5, 3.0, 5.0]
    # Noise may make a longer message quicker: above it the line does not fall.
    assert interpolate(9000, sizes, (3.0, 2.0)) == 2.0
    assert interpolate(9000, (1000,), (3.0,)) == 3.0

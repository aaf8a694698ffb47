"""Bytes as people read them: GB are 10⁹ bytes, GiB, MiB and KiB powers of 1024."""

GIB = 1 << 30


def gigabytes(nbytes: float, decimals: int = 1) -> str:
    """Write bytes in GB, without the unit; below 1 GB with three digits."""
    gb = nbytes / 1e9
    return f"{gb:.{decimals}f}" if abs(gb) >= 1 else f"{gb:.3g}"


def binary_size(nbytes: int) -> str:
    """Write bytes with the largest unit that fits: 256 B, 4 KiB, 1 MiB."""
    if nbytes < 1024:
        return f"{nbytes} B"
    kib = nbytes / 1024
    return f"{kib:g} KiB" if kib < 1024 else f"{kib / 1024:g} MiB"

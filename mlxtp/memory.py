"""How much memory a host has for weights, and how much a rank has used."""

import sys
from pathlib import Path

import mlx.core as mx


def available_bytes() -> int | None:
    """Bytes that this host can give to models; None where it does not tell.

    On a Mac what Metal lets the GPU wire (`max_recommended_working_set_size`), on
    Linux `MemAvailable` of /proc/meminfo.
    """
    if sys.platform == "darwin":
        return mx.device_info().get("max_recommended_working_set_size")
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024

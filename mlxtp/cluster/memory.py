"""What memory a host has, and what of it a model may take."""

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a host's memory, and those that programs can get now."""

    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """Ask the system for the memory of this host."""
    memory = psutil.virtual_memory()
    return HostMemory(memory.total, memory.available)


def available_bytes(gpu_limit: int | None) -> int:
    """Return the bytes that this host can give to models.

    Args:
        gpu_limit: what the GPU has for them, which decides where MLX computes on one
            (`mlxtp.checkpoint.memory.gpu_limit_bytes`); None on other machines.
    """
    return host_memory().available_bytes if gpu_limit is None else gpu_limit

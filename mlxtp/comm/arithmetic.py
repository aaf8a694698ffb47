"""What the last bits of a rank's arithmetic depend on, and whether ranks differ in it.

Chips, and MLX's builds for them, add and round in other orders. Ranks that differ
may decide otherwise where two tokens or two experts are nearly tied.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, Protocol

import mlx.core as mx

from mlxtp.cluster.processor import processor

Backend = Literal["CPU", "Metal", "CUDA"]


@dataclass(frozen=True)
class Arithmetic:
    """A chip, and the build of MLX that computes on it.

    `chip` is the name of the GPU, or of the processor where MLX has none.
    `instructions` are the processor's vector instructions; a GPU has none here.
    `system` is the operating system and the architecture. The host's name and memory
    are no part of it: they change no result.
    """

    chip: str
    instructions: tuple[str, ...]
    system: str
    backend: Backend
    mlx_version: str

    def __str__(self) -> str:
        """Name the chip and the build, as doctor does."""
        return f"{self.chip} ({self.system}, MLX {self.mlx_version} on {self.backend})"


class Gathers(Protocol):
    """Ranks that can exchange objects: a communicator, a transport, doctor's line."""

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the object of every rank, in rank order."""
        ...


def this_arithmetic() -> Arithmetic:
    """Describe the device that MLX computes on here by default."""
    backend = default_backend()
    cpu = processor()
    name = str(mx.device_info().get("device_name", ""))
    system = f"{platform.system()} {platform.machine()}".replace("Darwin", "macOS")
    if backend == "CPU" and platform.system() == "Linux":
        name = cpu.name  # MLX knows no name of Arm's processors
    instructions = cpu.instructions if backend == "CPU" else ()
    return Arithmetic(name, instructions, system, backend, version("mlx"))


def default_backend() -> Backend:
    """Name the backend of MLX's default device."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def machines_differ(ranks: Gathers) -> bool:
    """Whether any two ranks' last bits may differ: the same answer on every rank.

    Communicates: one allgather of objects.
    """
    return len(set(ranks.allgather_object(this_arithmetic()))) > 1

"""What the last bits of a rank's arithmetic depend on, and whether ranks differ in it.

Chips, and MLX's builds for them, add and round in other orders. Ranks that differ
may decide otherwise where two tokens or two experts are nearly tied.
"""

import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import mlx.core as mx

from mlxtp.cluster.processor import processor

Backend = Literal["CPU", "Metal", "CUDA"]

# The packages that hold a build of MLX. One for CUDA 12 and one for CUDA 13 differ in
# nothing else that a program can ask for.
BUILDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")


@dataclass(frozen=True)
class Arithmetic:
    """A chip, and the build of MLX that computes on it.

    `chip` is the name of the GPU, or of the processor where MLX has none.
    `instructions` are the processor's vector instructions; a GPU has none here.
    `system` is the operating system and the architecture; of macOS, which brings
    Metal's compiler and libraries, its version too. `build` names the packages that
    hold MLX's backend, none if it was built from source. The host's name and memory are
    no part of it: they change no result.
    """

    chip: str
    instructions: tuple[str, ...]
    system: str
    backend: Backend
    mlx_version: str
    build: str = ""

    def __str__(self) -> str:
        """Name the chip and the build, as doctor does."""
        mlx = f"MLX {self.mlx_version} on {self.backend}"
        build = f", {self.build}" if self.build else ""
        return f"{self.chip} ({self.system}, {mlx}{build})"


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
    system = f"{platform.system()} {platform.machine()}"
    if macos := platform.mac_ver()[0]:
        system = f"macOS {macos} {platform.machine()}"
    if backend == "CPU" and platform.system() == "Linux":
        name = cpu.name  # MLX knows no name of Arm's processors
    instructions = cpu.instructions if backend == "CPU" else ()
    return Arithmetic(name, instructions, system, backend, version("mlx"), _build())


def _build() -> str:
    """Name the packages that hold MLX's backend here, with their versions."""
    installed = []
    for package in BUILDS:
        with suppress(PackageNotFoundError):
            installed.append(f"{package} {version(package)}")
    return ", ".join(installed)


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

"""What a rank reports of its own machine."""

import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlxtp
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.cluster.memory import available_bytes
from mlxtp.comm.arithmetic import Arithmetic, this_arithmetic
from mlxtp.comm.transports import lacking
from mlxtp.doctor import linux, macos
from mlxtp.doctor.facts import Facts, Interface, Route

SYSTEM = macos if sys.platform == "darwin" else linux


@dataclass(frozen=True)
class Machine:
    """The machine that a rank runs on.

    `address` is where the other ranks reach it. `limit_bytes` is what a model may take
    of its memory, as `mlxtp.load` checks it. `lacks` says for each transport what it
    lacks on this machine; None where it lacks nothing. `arithmetic` is what MLX
    computes on.
    """

    rank: int
    host: str
    address: str
    python: str
    is_root: bool
    versions: dict[str, str]
    limit_bytes: int
    disk_free_bytes: int
    lacks: dict[str, str | None]
    facts: Facts
    arithmetic: Arithmetic

    def interface(self, name: str) -> Interface | None:
        """Return the interface of that name; None if there is none."""
        return next((i for i in self.facts.interfaces if i.name == name), None)

    @property
    def addresses(self) -> set[str]:
        """The addresses of all interfaces."""
        return {a for interface in self.facts.interfaces for a in interface.addresses}


def facts() -> Facts:
    """Ask this machine's system for what it says of the machine."""
    return SYSTEM.facts()


def describe(
    rank: int, address: str, facts: Facts, mpi_version: str, cache: Path
) -> Machine:
    """Put together all that a rank reports of its machine.

    `cache` is the folder where models are kept, which need not exist yet.
    """
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return Machine(
        rank=rank,
        host=socket.gethostname(),
        address=address,
        python=sys.executable,
        is_root=os.geteuid() == 0,
        versions={
            "mlxtp": mlxtp.__version__,
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
            "mpi4py": version("mpi4py"),
            "Open MPI": mpi_version,
            "Python": platform.python_version(),
        },
        limit_bytes=available_bytes(gpu_limit_bytes()),
        disk_free_bytes=shutil.disk_usage(existing).free,
        lacks=lacking(),
        facts=facts,
        arithmetic=this_arithmetic(),
    )


def route(address: str) -> Route | None:
    """Return how packets to `address` leave this machine; None without a route."""
    return SYSTEM.route(address)

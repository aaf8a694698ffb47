"""What a rank says of its own machine."""

import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlxtp
from mlxtp.checkpoint import memory
from mlxtp.comm.transports import lacking
from mlxtp.doctor import linux, macos
from mlxtp.doctor.facts import Facts, Interface, Route

HERE = macos if sys.platform == "darwin" else linux


@dataclass(frozen=True)
class Machine:
    """A rank's machine.

    `limit_bytes` is what a model may take, as `mlxtp.load` sees it.
    """

    rank: int
    host: str
    address: str  # under which the other ranks reach it
    python: str
    is_root: bool
    versions: dict[str, str]
    limit_bytes: int | None
    disk_free_bytes: int
    lacks: dict[str, str | None]  # transport -> what it lacks here
    facts: Facts

    def interface(self, name: str) -> Interface | None:
        return next((it for it in self.facts.interfaces if it.name == name), None)

    @property
    def addresses(self) -> set[str]:
        return {a for it in self.facts.interfaces for a in it.addresses}


def facts() -> Facts:
    """What this machine's tools say of it."""
    return HERE.facts()


def look(
    rank: int, address: str, facts: Facts, mpi_version: str, cache: Path
) -> Machine:
    """All of this machine; `cache` is where models are kept."""
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
        limit_bytes=memory.available_bytes(),
        disk_free_bytes=shutil.disk_usage(existing).free,
        lacks=lacking(),
        facts=facts,
    )


def route(address: str) -> Route | None:
    """The way that packets to `address` leave this machine by; None without one."""
    return HERE.route(address)

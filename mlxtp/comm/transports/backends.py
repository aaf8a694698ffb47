"""Starting MLX's backends among the ranks that mpirun has started.

What ranks have to know of each other before, they tell each other through `control`,
which is MPI.
"""

import json
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxtp.cluster.addresses import own_address
from mlxtp.comm.transports import Transport, rdma

# How long the last rank of a ring lets the others begin to listen: where nobody
# listens yet, MLX tries again after a second.
LISTEN_SECONDS = 0.1


def start(backend: str, control: Transport) -> mx.distributed.Group | None:
    """Start a backend between the ranks of `control`; None if there is one rank.

    Raises: ValueError, on every rank, for what is missing.
    """
    _agree_on_missing(backend, control)
    if control.size == 1:
        return None
    hosts = control.allgather_object(socket.gethostname())
    os.environ["MLX_RANK"] = str(control.rank)
    starts = {"ring": _start_ring, "jaccl": _start_jaccl}
    return starts[backend](control, hosts)


def missing(backend: str) -> str | None:
    """Return what this host lacks for a backend; None if it seems to lack nothing."""
    available = mx.distributed.is_available(backend)
    if backend == "jaccl" and not available:
        system = platform.system()
        version = f"macOS {platform.mac_ver()[0]}" if system == "Darwin" else system
        return (
            "needs macOS 26.2 or later, Thunderbolt 5 and RDMA enabled in Recovery "
            f"(rdma_ctl enable); this is {version}"
        )
    if backend == "jaccl" and not rdma.own_device_names():
        return (
            "needs RDMA enabled in Recovery (rdma_ctl enable): ibv_devices lists no "
            "device"
        )
    return None if available else f"this build of MLX has no backend {backend}"


def _agree_on_missing(backend: str, control: Transport) -> None:
    mine = (missing(backend), socket.gethostname())
    reports = control.allgather_object(mine)
    for rank, (report, host) in enumerate(reports):
        if report is not None:
            alike = all(other == report for other, _ in reports)
            where = "" if alike else f"rank {rank} on {host}: "
            raise ValueError(f"--transport {backend}: {where}{report}")


def _start_ring(control: Transport, hosts: list[str]) -> mx.distributed.Group:
    address = own_address(hosts)
    with _held_port(address) as port:
        addresses = control.allgather_object([f"{address}:{port}"])
        with _json_file(addresses) as path:
            os.environ["MLX_HOSTFILE"] = path
            control.barrier()
            if control.rank == control.size - 1:  # it connects before it listens
                time.sleep(LISTEN_SECONDS)
            return mx.distributed.init(strict=True, backend="ring")


def _start_jaccl(control: Transport, hosts: list[str]) -> mx.distributed.Group:
    given = control.bcast_object(os.environ.get("MLX_IBV_DEVICES"), 0)
    table: rdma.Devices = []
    if given is None:
        try:
            table = rdma.own_devices(control, hosts)
        except ValueError as error:
            raise ValueError(f"--transport jaccl: {error}") from None
        if not rdma.is_mesh(table):
            os.environ["MLX_JACCL_RING"] = "1"

    def side_channel(rank: int, size: int) -> Callable[[bytes, int], bytes]:
        return lambda mine, _: b"".join(control.allgather_object(bytes(mine)))

    devices = [[names or None for names in row] for row in table]
    with _json_file(devices) as path:
        os.environ["MLX_IBV_DEVICES"] = given or path
        try:
            return mx.distributed.init(
                strict=True, backend="jaccl", all_gather_factory=side_channel
            )
        except ValueError as error:  # of this rank alone: no mistake of a person
            raise RuntimeError(str(error)) from error


@contextmanager
def _held_port(address: str) -> Iterator[int]:
    """Hold a free port that no other job gets, and MLX of the same user may bind."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((address, 0))
        yield holder.getsockname()[1]


@contextmanager
def _json_file(value: Any) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(value, file)
        file.flush()
        yield file.name

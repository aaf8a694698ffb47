"""`--shares auto`: what was chosen for a model and these machines, else what suits.

What is chosen is kept with the slices, and holds until it is removed or the machines
are others: so a start does not fetch again what another start has fetched.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.cluster.memory import available_bytes, host_memory
from mlxtp.cluster.processor import processor
from mlxtp.cluster.units import GIB
from mlxtp.comm.communicator import Communicator
from mlxtp.dryrun.fitting import Fitting
from mlxtp.fetch.location import Location
from mlxtp.model.context import longest_context
from mlxtp.model.skeleton import EmptyModel
from mlxtp.partition.shares import Shares

logger = logging.getLogger(__name__)

# The context that caches are to have room for where nobody says which.
CONTEXT = 8192
# The best of so many reads of so many bytes tells how fast a rank reads. They are more
# than a processor's cache holds, and on a GPU more than a kernel takes to start.
READS = 5
READ_BYTES = 64 << 20
GPU_READ_BYTES = 1 << 30
# Equal machines are taken for equally fast unless they differ by such a factor.
MUCH_SLOWER = 1.5
# The size of a hidden vector, about.
COLLECTIVE_ELEMENTS = 8192


@dataclass(frozen=True)
class RankHost:
    """The host of a rank, as the search for shares takes it."""

    host: str
    limit_bytes: int
    bytes_per_second: float


def chosen_shares(
    comm: Communicator,
    location: Location,
    build: Callable[[], EmptyModel],
    context: int | Literal["max"] | None = None,
) -> Shares:
    """Return the shares that were chosen before, or choose and keep them.

    In a folder that was cut ahead of time they are those that all ranks have slices of.

    Args:
        comm: the ranks.
        location: where the model lies.
        build: makes the model without weights, a new one in each call.
        context: tokens that caches are to have room for; "max" are those that the model
            was made for.

    Communicates: allgathers and broadcasts of objects, and some small allreduces.
    Raises: UsageError on every rank if the model cannot be split over them.
    """
    if comm.size == 1:
        return Shares([1])
    machines = [list(one) for one in comm.allgather_object(_machine())]
    folder = location.folder
    kept = comm.allgather_object(cut.kept_shares(folder, machines))
    shares = next((one for one in kept if one is not None), None)
    if shares is None and location.repo is None and location.is_cut:
        shares = _cut_ahead(comm, folder)
    if shares is None:
        hosts = _hosts(comm, machines)
        collective_seconds = _collective_seconds(comm)
        with comm.agreement():
            has_gpu = gpu_limit_bytes() is not None
            wanted = context or CONTEXT
            if wanted == "max":
                wanted = longest_context(build().config)
            fitting = Fitting(
                *(build, hosts, wanted),
                is_fused=has_gpu,
                collective_seconds=collective_seconds,
            )
            shares = fitting.suited(wanted)
        shares = comm.bcast_object(shares)
        if comm.rank == 0:
            logger.warning(f"--shares auto: chosen for {location.name}: {shares}")
    assert shares is not None
    first_of_host = comm.allgather_object(comm.host).index(comm.host) == comm.rank
    if location.is_cut and first_of_host and kept[comm.rank] != shares:
        cut.keep_shares(folder, machines, shares)
    return shares


def _machine() -> tuple[str, int]:
    """What tells this rank's machine from others: its chip, and its memory in GiB."""
    device = mx.device_info().get("device_name")
    chip = str(device) if mx.default_device() == mx.gpu else processor().name
    return chip, round(host_memory().total_bytes / GIB)


def _cut_ahead(comm: Communicator, folder: Path) -> Shares | None:
    """The shares that every rank's folder has its own slices of, uneven ones first."""
    mine = {
        shard.shares
        for shard in cut.shards(folder)
        if shard.rank == comm.rank and len(shard.shares) == comm.size
    }
    common = set.intersection(*comm.allgather_object(mine))
    even = Shares([1] * comm.size)
    return min(common, key=lambda each: (each == even, str(each)), default=None)


def _hosts(comm: Communicator, machines: cut.Machines) -> list[RankHost]:
    """What the ranks' hosts have, with how fast they read while all do.

    Ranks on one host get their mean, for they share what it has; so do equal machines,
    unless some is much slower than it should be.
    """
    comm.barrier()
    told = comm.allgather_object(
        (comm.host, available_bytes(gpu_limit_bytes()), _bytes_per_second())
    )
    hosts = []
    for (host, _, _), machine in zip(told, machines, strict=True):
        limits = [limit for name, limit, _ in told if name == host]
        rates = [rate for name, _, rate in told if name == host]
        equal = [
            rate
            for (_, _, rate), other in zip(told, machines, strict=True)
            if other == machine
        ]
        if max(equal) < MUCH_SLOWER * min(equal):
            rates = equal
        hosts.append(RankHost(host, min(limits), sum(rates) / len(rates)))
    return hosts


def _collective_seconds(comm: Communicator) -> float:
    """What a small allreduce takes, from an evaluated array to an evaluated array."""
    x = mx.ones((COLLECTIVE_ELEMENTS,), mx.bfloat16)
    mx.eval(comm.allreduce(x))
    seconds = []
    for _ in range(READS):
        begin = time.perf_counter()
        mx.eval(comm.allreduce(x))
        seconds.append(time.perf_counter() - begin)
    return sorted(comm.bcast_object(seconds))[READS // 2]


def _bytes_per_second() -> float:
    """How fast this rank reads weights, in a product of a matrix and a vector."""
    size = READ_BYTES if gpu_limit_bytes() is None else GPU_READ_BYTES
    width = 4096
    weight = mx.ones((size // (2 * width), width), mx.bfloat16)
    x = mx.ones((1, width), mx.bfloat16)
    mx.eval(weight, x @ weight.T)
    best = 0.0
    for _ in range(READS):
        begin = time.perf_counter()
        mx.eval(x @ weight.T)
        best = max(best, weight.nbytes / (time.perf_counter() - begin))
    del weight
    mx.clear_cache()  # slices need the memory
    return best

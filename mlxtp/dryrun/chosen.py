"""`--shares auto`: what was chosen for a model and these machines, else what suits.

What is chosen is kept with the slices, and holds until it is removed or the machines
are others: so a start does not fetch again what another start has fetched.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
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


def kept_shares(comm: Communicator, location: Location) -> Shares | None:
    """Return the shares that were chosen before for these machines, if they were.

    In a folder that was cut ahead of time all ranks have to have slices of them, or
    others that all have slices of are taken.

    Communicates: allgathers of objects.
    """
    folder = location.folder
    kept = comm.allgather_object(cut.kept_shares(folder, _machines(comm)))
    shares = next((one for one in kept if one is not None), None)
    there = _cut_ahead(comm, location)
    if not there or shares in there:
        return shares
    even = Shares([1] * comm.size)
    return min(there, key=lambda each: (each == even, str(each)))


def suited_shares(
    comm: Communicator,
    location: Location,
    build: Callable[[], EmptyModel],
    context: int | Literal["max"] | None = None,
) -> Shares:
    """Choose the shares that suit the ranks' hosts.

    Args:
        comm: the ranks.
        location: where the model lies.
        build: makes the model without weights, a new one in each call.
        context: tokens that caches are to have room for; "max" are those that the model
            was made for.

    Communicates: allgathers and broadcasts of objects, and some small allreduces.
    Raises: UsageError on every rank if the model cannot be split over them.
    """
    hosts = _hosts(comm, _machines(comm))
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
        suited = fitting.suited(wanted)
    shares: Shares = comm.bcast_object(suited)
    if comm.rank == 0:
        logger.warning(f"--shares auto: chosen for {location.name}: {shares}")
    return shares


def keep(comm: Communicator, location: Location, shares: Shares) -> None:
    """Keep shares with the slices, on each host where others or none are kept.

    Communicates: allgathers of objects.
    """
    machines = _machines(comm)
    is_first = comm.allgather_object(comm.host).index(comm.host) == comm.rank
    folder = location.folder
    if location.is_cut and is_first and cut.kept_shares(folder, machines) != shares:
        cut.keep_shares(folder, machines, shares)


def _machines(comm: Communicator) -> cut.Machines:
    return [list(one) for one in comm.allgather_object(_machine())]


def _machine() -> tuple[str, int]:
    """What tells this rank's machine from others: its chip, and its memory in GiB."""
    device = mx.device_info().get("device_name")
    chip = str(device) if mx.default_device() == mx.gpu else processor().name
    return chip, round(host_memory().total_bytes / GIB)


def _cut_ahead(comm: Communicator, location: Location) -> set[Shares]:
    """The shares that the local folders of all ranks with cut ones have slices of."""
    mine = None
    if location.repo is None and location.is_cut:
        mine = {
            shard.shares
            for shard in cut.shards(location.folder)
            if shard.rank == comm.rank and len(shard.shares) == comm.size
        }
    of_ranks = [each for each in comm.allgather_object(mine) if each is not None]
    return set.intersection(*of_ranks) if of_ranks else set()


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

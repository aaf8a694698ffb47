"""Machines and links: what is published of them, or what doctor has measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxtp.cluster.curve import interpolate
from mlxtp.cluster.measured import Measured
from mlxtp.cluster.units import GIB

# Apple's figures of memory bandwidth, GB/s, and the cores of the GPU with their clock,
# MHz, as hmc-tech.com lists them (M5: taken to be the M4's). A core has 128 lanes, each
# of which multiplies and adds once in a cycle.
_CHIPS: dict[str, tuple[int, int, int]] = {
    "M1 Max": (400, 32, 1296),
    "M1 Ultra": (800, 64, 1296),
    "M2 Max": (400, 38, 1398),
    "M2 Ultra": (800, 76, 1398),
    "M3 Max": (400, 40, 1398),
    "M3 Ultra": (819, 80, 1398),
    "M4 Pro": (273, 20, 1678),
    "M4 Max": (546, 40, 1678),
    "M4 Max 32-core": (410, 32, 1678),
    "M5 Max": (614, 40, 1678),
    "M5 Max 32-core": (460, 32, 1678),
}
CHIPS = tuple(_CHIPS)

# The share of a chip's figures that MLX reaches: of its bandwidth in matrix-vector
# products, of its arithmetic in matrix products. Assumed.
BANDWIDTH_SHARE = 0.75
FLOPS_SHARE = 0.6
# The share of a Mac's memory that the GPU may wire, unless iogpu.wired_limit_mb says
# otherwise: 51.5 GB of 64 GiB (up to 55.7 have been reported).
WIRED_SHARE = 0.75
# The share of the rate of large matrix products that products with a few tokens reach.
# MLX's kernels for vectors multiply anew for each of them: with 0.6 of above, 0.24 of
# the GPU's arithmetic. Reported: 0.2 of an M3 Ultra's (mlx 4265), 0.3 of an M4 Pro's
# (mlx 3839), 0.4 of an M5 Max's (mlx 3791); of an M1 or M2 there is no figure.
FEW_TOKENS_SHARE = 0.4
# A large product takes as long for fewer tokens as for so many (MLX's tiles).
TILE_TOKENS = 32
# From the GPU to the CPU and back, where another kernel goes on: 180 µs, and 4 µs with
# MLX_METAL_FAST_SYNCH=1 (mlx 4438, M3 Ultra; 150 to 200 and 15 to 20 in mlx 1773).
# MLX's documentation advises against the latter (mlx 4005): GPUs have been wedged until
# a restart (mlx 3142, 3830). Metal has no collectives on the GPU, so each collective is
# a crossing, whether it stands in MLX's graph or not.
CROSSING_SECONDS = 180e-6
FAST_CROSSING_SECONDS = 5e-6
# To start a kernel, as one of many. Assumed.
OPERATION_SECONDS = 3e-6
# To add an element of a part: five parts of 4 Mi bfloat16 elements take 9 ms
# (docs/log.md, on Linux).
ADD_SECONDS = 0.45e-9


@dataclass(frozen=True)
class Machine:
    """The machine that a rank runs on. Its rates are those that MLX reaches.

    `limit_bytes` is what a model may take; where it is None, nobody can say whether a
    model fits. `bytes_per_second` is the rate of reading weights, `flops` the rate of
    arithmetic. `operation_seconds` is the time to start one of MLX's operations: on a
    GPU a norm, a rotation or attention is one. `crossing_seconds` is spent once for
    each collective: from the GPU to the CPU and back.
    """

    host: str
    chip: str
    memory_bytes: int
    limit_bytes: int | None
    bytes_per_second: float
    flops: float
    operation_seconds: float
    crossing_seconds: float
    has_gpu: bool = False

    @property
    def few_tokens_flops(self) -> float:
        """The rate of arithmetic where a product has a few tokens only."""
        return self.flops * (FEW_TOKENS_SHARE if self.has_gpu else 1.0)


@dataclass(frozen=True)
class Link:
    """One hop: a cable, or the path through a switch.

    `topology` is what such links usually build: "ring", "mesh" or "switch".
    `transport` is what the collectives go over, "mpi" or "jaccl".
    """

    hop_seconds: float
    bytes_per_second: float
    topology: str
    transport: str = "mpi"


# A hop of TCP. Over Thunderbolt round trips of 0.38 to 0.95 ms have been reported (exo
# 2063 and 2295), so 190 to 475 µs one way. For 10 Gb Ethernet the same is assumed: TCP
# takes most of it.
TCP_HOP_SECONDS = 300e-6
# RDMA over Thunderbolt 5 has less than 50 µs (Apple, TN3205; single-digit figures have
# been reported). Rates are those of the standards; TCP reaches less.
LINKS = {
    "thunderbolt4": Link(TCP_HOP_SECONDS, 40e9 / 8, "ring"),
    "thunderbolt5": Link(TCP_HOP_SECONDS, 80e9 / 8, "ring"),
    "10gbe": Link(TCP_HOP_SECONDS, 10e9 / 8, "switch"),
    "rdma": Link(25e-6, 80e9 / 8, "ring", "jaccl"),
}
# JACCL refuses a mesh of more ranks (MLX's mesh.cpp).
JACCL_MESH_RANKS = 8
TOPOLOGIES = ("ring", "mesh", "switch")


def published(
    host: str,
    chip: str,
    memory_gb: float,
    crossing_seconds: float = CROSSING_SECONDS,
) -> Machine:
    """Describe a Mac by Apple's figures; Apple's GB of memory are GiB.

    Raises: ValueError if the chip is not known.
    """
    known = {name.lower(): name for name in CHIPS}
    name = known.get(" ".join(chip.lower().removeprefix("apple ").split()))
    if name is None:
        raise ValueError(
            f"--chip {chip}: known are {', '.join(CHIPS)}; what another machine has "
            "is measured: mlxtp.doctor --json FILE, then --measured FILE"
        )
    bandwidth, cores, megahertz = _CHIPS[name]
    memory = round(memory_gb * GIB)
    return Machine(
        host,
        name,
        memory,
        round(WIRED_SHARE * memory),
        BANDWIDTH_SHARE * bandwidth * 1e9,
        FLOPS_SHARE * cores * 128 * 2 * megahertz * 1e6,
        OPERATION_SECONDS,
        crossing_seconds,
        True,
    )


@dataclass(frozen=True)
class Network:
    """The network of all ranks, calculated from one link."""

    ranks: int
    link: Link
    topology: str

    def __post_init__(self) -> None:
        """Raise ValueError for a mesh of more ranks than JACCL has."""
        is_mesh = (self.link.transport, self.topology) == ("jaccl", "mesh")
        if is_mesh and self.ranks > JACCL_MESH_RANKS:
            raise ValueError(
                f"JACCL has no mesh of {self.ranks} ranks: at most {JACCL_MESH_RANKS}"
            )

    def seconds(self, kind: str, part_bytes: int, item_bytes: int) -> float:
        """Return the seconds of an allreduce or allgather of all ranks.

        Args:
            kind: "allreduce" or "allgather".
            part_bytes: bytes that each rank brings.
            item_bytes: bytes of an element.
        """
        if self.ranks == 1:
            return 0.0
        if self.link.transport == "jaccl":
            return self._jaccl_seconds(kind, part_bytes)
        algorithms = self._algorithms()
        if kind != "allreduce":
            algorithms = algorithms[:1]
        adds = ADD_SECONDS * part_bytes / item_bytes if kind == "allreduce" else 0.0
        return min(
            hops * self.link.hop_seconds
            + parts * part_bytes / self.link.bytes_per_second
            + adds * added
            for hops, parts, added in algorithms
        )

    def _algorithms(self) -> list[tuple[int, float, float]]:
        """One-shot, then two-shot: hops, parts over the busiest cable, parts added.

        Derived in docs/communication.md.
        """
        n, far = self.ranks, self.ranks // 2
        direct = {
            "ring": far * (far + 1) / 2,
            "mesh": 1.0,
            "switch": n - 1.0,
        }[self.topology]
        if self.topology == "ring":
            # Of two or three ranks all are neighbours.
            by_neighbours = (n - 1) / 2 if n > 3 else direct
            return [
                (far, min(direct, by_neighbours), n),
                (2 * far, (direct + by_neighbours) / n, 1),
                (2 * far, 2 * direct / n, 1),
            ]
        return [(1, direct, n), (2, 2 * direct / n, 1)]

    def _jaccl_seconds(self, kind: str, part_bytes: int) -> float:
        """The seconds over JACCL, where an allreduce gathers and adds on the GPU.

        A gather is one exchange in a mesh. In a ring it takes N - 1 steps, with half
        of each part either way (MLX's source).
        """
        n = self.ranks
        hops, parts = (1, 1.0) if self.topology == "mesh" else (n - 1, (n - 1) / 2)
        adds = (n + 1) * OPERATION_SECONDS if kind == "allreduce" else 0.0
        seconds = hops * self.link.hop_seconds + adds
        return seconds + parts * part_bytes / self.link.bytes_per_second

    def message_seconds(self, message_bytes: int) -> float:
        """Return the seconds of a message to a neighbour."""
        return self.link.hop_seconds + message_bytes / self.link.bytes_per_second

    def bcast_seconds(self, nbytes: int) -> float:
        """Return the seconds until `nbytes` bytes of one rank have come to all."""
        return self.seconds("allgather", nbytes, nbytes)


@dataclass(frozen=True)
class MeasuredNetwork(Network):
    """A network whose collectives doctor has timed.

    `curves` are, by the kind of collective, bytes of a part and the seconds for each.
    """

    curves: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]

    def seconds(self, kind: str, part_bytes: int, item_bytes: int) -> float:
        """Return the measured seconds; arguments as in `Network`."""
        if kind not in self.curves:
            return super().seconds(kind, part_bytes, item_bytes)
        return interpolate(part_bytes, *self.curves[kind])


def network_of(measured: Measured, chosen: Sequence[int], topology: str) -> Network:
    """Describe the network of some of the ranks that doctor measured.

    The times of collectives hold for all measured ranks together, in their order. For
    others they are calculated from the links.
    """
    ranks = len(chosen)
    pairs = [pair for pair in measured.pairs if {*pair.ranks} <= {*chosen}]
    link = Link(
        min((p.latency_seconds for p in pairs), default=0.0),
        max((p.bytes_per_second for p in pairs), default=float("inf")),
        topology,
    )
    if list(chosen) != list(range(len(measured.hosts))):
        return Network(ranks, link, topology)
    curves = {}
    for kind in {collective.name for collective in measured.collectives}:
        points = sorted(
            (collective.part_bytes, collective.seconds)
            for collective in measured.collectives
            if collective.name == kind
        )
        curves[kind] = (tuple(p for p, _ in points), tuple(s for _, s in points))
    return MeasuredNetwork(ranks, link, topology, curves)

"""Which RDMA device of this host leads to which rank.

Not tried on hardware: it reads what macOS prints as MLX's own set-up tool reads it
(`mlx.distributed_config`), and only its output as text has been tested. That tool's
code is not used: it asks all hosts over ssh, ends the process where a cable is
missing, and takes the order of the hosts in a ring from the cables, not from the ranks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from mlxtp.cluster.commands import output
from mlxtp.cluster.ports import thunderbolt
from mlxtp.comm.transports import Transport

# For each rank the devices that lead to each other rank; none where no cable is.
Devices = list[list[list[str]]]

# How many ranks MLX can join in a mesh, and how many cables between neighbours.
MESH_RANKS = 8
RING_CABLES = 4


@dataclass(frozen=True)
class Port:
    """A Thunderbolt port of a host, with the device that does RDMA over it."""

    device: str
    domain: str
    peer: str | None  # domain of the port at the other end of the cable


def device_names(ibv_devices: str) -> set[str]:
    """Return the RDMA devices over Thunderbolt that `ibv_devices` lists."""
    words = (line.split() for line in ibv_devices.splitlines())
    return {word[0] for word in words if word and word[0].startswith("rdma_")}


def ports(profile: str, hardware_ports: str, ibv_devices: str) -> list[Port]:
    """Return the ports with an RDMA device, from what the three commands print."""
    devices = device_names(ibv_devices)
    with_rdma = [
        Port(f"rdma_{port.interface}", port.domain, port.peer)
        for port in thunderbolt(profile, hardware_ports)
        if f"rdma_{port.interface}" in devices
    ]
    return sorted(with_rdma, key=lambda port: port.device)


def own_device_names() -> set[str]:
    """Return the RDMA devices of this host."""
    return device_names(output("ibv_devices"))


def own_ports() -> list[Port]:
    """Return the ports of this host that have an RDMA device."""
    return ports(
        output("system_profiler", "SPThunderboltDataType", "-json"),
        output("networksetup", "-listallhardwareports"),
        output("ibv_devices"),
    )


def devices(hosts: Sequence[str], ports: Sequence[Sequence[Port]]) -> Devices:
    """Return the devices between ranks that are a mesh, or a ring in rank order.

    Raises: ValueError that names the neighbours without a cable.
    """
    size = len(hosts)
    host, ranks_there = Counter(hosts).most_common(1)[0]
    if ranks_there > 1:
        raise ValueError(f"needs a host for each rank, {host} has {ranks_there}")
    cables = _cables(ports)
    joined = list(combinations(range(size), 2))
    if size > MESH_RANKS or any(not cables[pair] for pair in joined):
        joined = sorted({_pair(rank, (rank + 1) % size) for rank in range(size)})
    for a, b in joined:
        if not cables[a, b]:
            raise ValueError(
                f"no cable that does RDMA joins {hosts[a]} (rank {a}) and {hosts[b]} "
                f"(rank {b}): the hosts have to be a mesh, or a ring in rank order"
            )
    # MLX wants equally many everywhere.
    count = min(RING_CABLES, *(len(cables[pair]) for pair in joined))
    table: Devices = [[[] for _ in hosts] for _ in hosts]
    for a, b in joined:
        for end_a, end_b in cables[a, b][:count]:
            table[a][b].append(end_a)
            table[b][a].append(end_b)
    return table


def is_mesh(table: Devices) -> bool:
    """Whether devices lead from every rank to every other."""
    size = len(table)
    return all(table[a][b] for a in range(size) for b in range(size) if a != b)


def own_devices(control: Transport, hosts: Sequence[str]) -> Devices:
    """Return the devices between the ranks on `hosts`, as their hosts see them.

    Communicates: one allgather of each host's ports.
    Raises: ValueError as `devices`.
    """
    return devices(hosts, control.allgather_object(own_ports()))


def _cables(
    ports: Sequence[Sequence[Port]],
) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """Return, for each pair of ranks, the devices at both ends of each cable."""
    owners = {
        port.domain: (rank, port) for rank, own in enumerate(ports) for port in own
    }
    cables: dict[tuple[int, int], list[tuple[str, str]]] = {
        pair: [] for pair in combinations(range(len(ports)), 2)
    }
    for a, own in enumerate(ports):
        for port in own:
            b, end = owners.get(port.peer or "", (a, port))
            if a < b:
                cables[a, b].append((port.device, end.device))
    return cables


def _pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)

"""What `mlxtp.doctor` measures of a cluster: `mlxtp.plan --measured` reads it."""

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Host:
    """A rank's host, measured while all ranks are at work.

    `chip` is what MLX computes on, a GPU or a processor. `limit_bytes` is what a model
    may take: on a Mac what the GPU may wire, with CUDA what is free on the card,
    elsewhere what is available. `bytes_per_second` is the rate at which matrix-vector
    products read weights, `flops` the floating-point operations of matrix products a
    second. `token_seconds` is the time of a token of the model that ships, computed
    whole, without its collectives.
    """

    rank: int
    host: str
    chip: str
    has_gpu: bool
    memory_bytes: int
    limit_bytes: int | None
    bytes_per_second: float
    flops: float
    token_seconds: float


@dataclass(frozen=True)
class Pair:
    """The link between two ranks: latency one way, and the rate of long messages."""

    ranks: tuple[int, int]
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Collective:
    """The median time of an allreduce or allgather of all ranks, array to array.

    `part_bytes` is what each rank brings.
    """

    name: str
    part_bytes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A cluster, by rank."""

    hosts: tuple[Host, ...]
    pairs: tuple[Pair, ...]
    collectives: tuple[Collective, ...]

    def ranks_of(self, names: Sequence[str]) -> list[int]:
        """Return the measured rank for each of some hosts' names.

        A host of several ranks is named as often. studio1 is studio1.local as well.

        Raises: ValueError for a host on which not as many ranks were measured.
        """
        ranks: list[int] = []
        for name in names:
            there = [r for r, host in enumerate(self.hosts) if _is(host.host, name)]
            left = [rank for rank in there if rank not in ranks]
            if not left:
                hosts = ", ".join(dict.fromkeys(host.host for host in self.hosts))
                count = f"only {len(there)} of its ranks were" if there else "was not"
                raise ValueError(f"{name}: {count} measured; measured were {hosts}")
            ranks.append(left[0])
        return ranks

    def write(self, file: Path) -> None:
        """Write it as JSON, in bytes and seconds."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Measured":
        """Read what `write` has written.

        Raises: ValueError, with the file, if it holds nothing of the kind.
        """
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            return cls(
                tuple(Host(**host) for host in content["hosts"]),
                tuple(
                    Pair(**{**pair, "ranks": tuple(pair["ranks"])})
                    for pair in content["pairs"]
                ),
                tuple(Collective(**one) for one in content["collectives"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not what mlxtp.doctor --json writes: {error!r}"
            ) from None


def _is(host: str, name: str) -> bool:
    """Whether two names are of one host; one of them may be without its domain."""
    if name == "localhost":
        name = socket.gethostname()
    host, name = host.lower(), name.lower()
    return name in (host, host.partition(".")[0]) or name.partition(".")[0] == host
